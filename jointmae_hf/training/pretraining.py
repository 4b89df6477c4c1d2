"""Pre-training of Joint-MAE on Accelerate.

Notable choices:

- A run is a pure function of its arguments. Batches are a function of (seed, epoch, indices), the learning rate of the
  step, and torch's generator is seeded anew at each step, so a resumed run repeats an uninterrupted one bit for bit.
- `batch_size` counts the samples of an optimizer step. How they spread over processes and accumulation steps changes
  the losses by rounding only (and by which samples stochastic depth drops and which shapes are compared with each
  other, where the configuration has either).
- Losses are averaged over processes at each step in one tensor, which carries the wish to stop too: all processes see
  a loss that is not finite, or a signal, at the same step. On a GPU that tensor is read one step late, so that nothing
  waits for it, and the next batches are made and moved by a thread meanwhile.
- All batches of a process have one size, so nothing is compiled for a second one.
"""

import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from .. import JointMAEConfig, JointMAEForPreTraining, JointMAEPointCloudProcessor
from ..configuration_joint_mae import own_fields
from ..data.augmentation import STEPS, Augmentation, counter_generator
from ..data.collation import EpochBatches, PreTrainingCollator, StreamBatches
from ..data.loading import (
    PointTable,
    check_column,
    check_disjoint,
    load_point_clouds,
    load_point_dataset,
    load_point_table,
)
from ..data.mixture import MixedBatches, finish_batch, open_sources, parse_mixture
from ..files import replace_text
from .arguments import PreTrainingArguments, build_config
from .averaging import WeightAverage
from .checkpoints import (
    LOCK,
    LOG,
    MODEL,
    STATE,
    abandon_checkpoints_after,
    folder_of_one_run,
    latest_checkpoint,
    list_checkpoints,
    load_average,
    load_weights,
    read_json,
    remove_old_checkpoints,
    remove_unfinished,
    save_checkpoint,
    save_model_folder,
    verify_checkpoint,
    whole_weights,
)
from .compilation import compile_blocks, release_blocks
from .flops import peak_flops, training_flops
from .graphs import GraphedBackward
from .optimization import build_optimizer, learning_rate_at, loss_gradient_norms, set_learning_rate
from .prefetch import prefetch
from .sharding import is_spread, whole
from .signals import StopSignals, outlive_a_signal
from .summary import summarize
from .threads import AgreementThreads, ReplicaThreads


logger = logging.getLogger(__name__)

RESULT = "result.json"
_TRACKERS = "runs"

# Arguments that a resumed run must share with the one it continues. The data is compared by content, the
# configuration field by field; what is left (output, logging, workers, accumulation, ...) changes nothing or rounding.
DECISIVE = (
    "seed",
    "batch_size",
    "epochs",
    "max_steps",
    "split",
    "points_column",
    "streaming",
    "scale_min",
    "scale_max",
    "max_shift",
    "rotation",
    "max_tilt",
    "max_jitter",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "mixed_precision",
    "ema_decay",
)
# Without an epoch's length, the losses of the result are means over this many last steps.
_FINAL_STEPS_OF_STREAM = 100
# Batches that are on a GPU before they are needed.
_BATCHES_AHEAD = 2


class NonFiniteLossError(RuntimeError):
    """A loss or the gradient became NaN or infinite; the message names the step, the term and the last checkpoint."""


@dataclass
class LossMeter:
    """Sums of the losses over some steps."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, losses: dict[str, float]):
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in losses.items()}
        self.count += 1

    def mean(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}


@dataclass
class Progress:
    """
    What a run has done so far; saved with each checkpoint.

    Args:
        step: optimizer steps.
        seconds: time spent in them, interruptions left out.
        since_log: losses since the last line of the log.
        last_epoch: losses of the steps of the last epoch of the run.
        position: of this process in its stream.
    """

    step: int = 0
    seconds: float = 0.0
    since_log: LossMeter = field(default_factory=LossMeter)
    last_epoch: LossMeter = field(default_factory=LossMeter)
    position: dict[str, Any] | None = None


def pretrain(arguments: PreTrainingArguments) -> dict[str, Any] | None:
    """
    Pre-trains a model, saves it, and reports on it.

    Args:
        arguments: what to do.

    Returns:
        What `result.json` in the output folder holds; `None` in all but the main process.

    Raises:
        ValueError: for arguments or data that cannot be used.
        FileExistsError: if the output folder holds something and neither resuming nor overwriting was asked for.
        CheckpointError: if the checkpoint to resume from is missing or damaged.
        NonFiniteLossError: if a loss stopped being finite.
        SystemExit: with code 128 + signal, after SIGINT or SIGTERM and the checkpoint that they cause.
    """
    return PreTrainer(arguments).run()


class PreTrainer:
    """One run of pre-training; use [`pretrain`]."""

    def __init__(self, arguments: PreTrainingArguments):
        git_commit()  # the clone may move on while this runs
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        if arguments.dataset is None and arguments.train_data is None:
            raise ValueError("`dataset` is None, expected a name on the Hub, a folder or a parquet file.")
        self.evaluates = arguments.evaluate and arguments.dataset is not None and not arguments.streaming
        if arguments.evaluate and not self.evaluates:
            logger.warning("Without `dataset`, or with a stream, there is nothing to evaluate on: no report.")
        if self.evaluates:  # what the report needs is better missed now than in the end
            import matplotlib.pyplot  # noqa: F401
            import sklearn.svm  # noqa: F401

        self.config = build_config(arguments)
        self.accelerator = self._build_accelerator()
        # The launcher may have decided these.
        self.arguments = replace(
            arguments,
            mixed_precision=self.accelerator.mixed_precision,
            gradient_accumulation_steps=self.accelerator.gradient_accumulation_steps,
        )
        self.is_main = self.accelerator.is_main_process
        # On a GPU, a step's losses are read when the next one is under way.
        self.on_gpu = self.accelerator.device.type == "cuda"
        self.lag = 0 if self.accelerator.device.type == "cpu" else 1
        self.checkpoint = self._find_checkpoint()
        self._load_data()
        self._build_model()
        self.progress = Progress() if self.checkpoint is None else self._resume(self.checkpoint)
        self.unread: deque[tuple[int, torch.Tensor]] = deque()
        self.losses: dict[str, float] = {}
        self.grad_norm = math.nan
        self.stop_signals = StopSignals()

    # ---- Preparation

    def _build_accelerator(self) -> Accelerator:
        arguments = self.arguments
        trackers = [name.strip() for name in arguments.report_to.split(",") if name.strip() not in ("", "none")]
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            log_with=trackers or None,
            project_config=ProjectConfiguration(str(self.output_dir), str(self.output_dir / _TRACKERS)),
        )
        check_processes(accelerator.num_processes)
        sharding = getattr(accelerator.state, "fsdp_plugin", None)
        if sharding is not None and sharding.transformer_cls_names_to_wrap is None:
            # Accelerate shards the input embedding by itself, so the module that holds it must not be a unit.
            sharding.transformer_cls_names_to_wrap = ["JointMAELayer"]
        if accelerator.device.type == "cpu":
            share_cores(accelerator.num_processes, arguments.num_threads)
        if len(accelerator.log_with) < len(trackers):
            raise ValueError(f"`report_to` is {arguments.report_to!r}, but not all of these trackers are installed.")
        if arguments.cuda_graph:
            self._check_graph(accelerator)
        if arguments.compile and arguments.grad_norm_steps:
            # Compiled graphs else reuse memory that a second backward pass over the same graph needs.
            torch._functorch.config.donated_buffer = False
        return accelerator

    def _check_graph(self, accelerator: Accelerator):
        """Raises `ValueError` where forward and backward pass cannot be one graph."""
        device, accumulation = accelerator.device.type, accelerator.gradient_accumulation_steps
        for is_wrong, found, expected in (
            (device != "cuda", f"on {device}", "a GPU"),
            (accelerator.num_processes > 1, f"in {accelerator.num_processes} processes", "one"),
            (accelerator.mixed_precision == "fp16", "with `mixed_precision` fp16", "bf16 or no"),
            (accumulation > 1, f"with `gradient_accumulation_steps` {accumulation}", "1"),
        ):
            if is_wrong:
                raise ValueError(f"`cuda_graph` is True {found}, expected {expected}.")

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, undamaged, or `None`; refuses an output folder that holds something else."""
        wanted, output_dir = self.arguments.resume_from_checkpoint, self.output_dir
        present = set(os.listdir(output_dir)) - {LOCK} if output_dir.is_dir() else set()
        if wanted is None:
            checkpoint = None
        elif wanted == "latest":
            checkpoint = latest_checkpoint(output_dir)
            if checkpoint is None:
                # A run that was killed before its first checkpoint left no more than this.
                present -= {LOG, _TRACKERS} | {name for name in present if name.endswith(".partial")}
                if self.is_main:
                    logger.info("There is no checkpoint in %s yet: starting from the beginning.", output_dir)
        else:
            checkpoint = Path(wanted)
            if list_checkpoints(checkpoint):
                raise ValueError(
                    f"`resume_from_checkpoint` is {wanted}, a folder of checkpoints, expected one of them or `latest`."
                )
            verify_checkpoint(checkpoint)
        self.continues_here = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
        if present and not self.continues_here and not self.arguments.overwrite_output_dir:
            raise FileExistsError(
                f"`output_dir` {output_dir} is not empty. Choose another one, continue its run with "
                "--resume_from_checkpoint latest, or discard it with --overwrite_output_dir."
            )
        return checkpoint

    def _load_data(self):
        arguments = self.arguments
        collator = PreTrainingCollator(
            self.config,
            Augmentation(
                (arguments.scale_min, arguments.scale_max),
                arguments.max_shift,
                arguments.rotation,
                arguments.max_tilt,
                arguments.max_jitter,
            ),
            arguments.seed,
        )
        self.layout = {
            "batch_size": arguments.batch_size,
            "num_processes": self.accelerator.num_processes,
            "process_index": self.accelerator.process_index,
            "accumulation": arguments.gradient_accumulation_steps,
        }
        self.num_workers = arguments.num_workers
        if self.num_workers is None:
            self.num_workers = 2 if self.on_gpu else 0
        self.steps_per_epoch, self.total_steps = None, arguments.max_steps
        if arguments.train_data is not None:
            self._load_mixture(collator)
        elif arguments.streaming:
            self._load_stream(collator)
        else:
            self._load_clouds(collator)
        if collator.compares_views and self.data.part_size < 2:
            raise ValueError(
                f"`batch_size` is {arguments.batch_size}, one sample for each process and accumulation step, but "
                "`agreement_loss_weight` compares several."
            )
        self.warmup_steps = round(arguments.warmup_ratio * self.total_steps)
        self.final_steps = self.steps_per_epoch or _FINAL_STEPS_OF_STREAM
        if self.evaluates and self.is_main:
            self.report_tables = self._load_report_tables()

    def _load_mixture(self, collator: PreTrainingCollator):
        arguments = self.arguments
        weights = parse_mixture(arguments.train_data)
        # Each of two views draws half of the points.
        num_points = self.config.num_points * (2 if collator.compares_views else 1)
        with self.accelerator.main_process_first():
            chosen = (arguments.split, arguments.points_column, arguments.dataset_config_name)
            sources = open_sources(list(weights), num_points, arguments.seed, *chosen)
        self.data = MixedBatches(sources, weights, collator, deferred=self.on_gpu, **self.layout)
        self.fingerprint = self.data.fingerprint()

    def _load_stream(self, collator: PreTrainingCollator):
        arguments, dataset = self.arguments, self._open_dataset()
        self.data = StreamBatches(
            dataset,
            arguments.points_column,
            collator,
            shuffle_buffer_size=arguments.shuffle_buffer_size,
            **self.layout,
        )
        self.fingerprint = {
            "name": arguments.dataset,
            "config_name": arguments.dataset_config_name,
            "first_cloud": first_cloud_checksum(dataset, arguments.points_column),
            "num_processes": self.accelerator.num_processes,
        }

    def _load_clouds(self, collator: PreTrainingCollator):
        arguments = self.arguments
        clouds = load_point_clouds(self._open_dataset(), arguments.points_column)
        self.data = EpochBatches(clouds, collator, **self.layout)
        self.fingerprint = clouds.fingerprint()
        self.steps_per_epoch = self.data.steps_per_epoch
        self.total_steps = arguments.max_steps or max(1, round(arguments.epochs * self.steps_per_epoch))

    def _open_dataset(self) -> Any:
        arguments = self.arguments
        source = (arguments.dataset, arguments.split, arguments.streaming, arguments.dataset_config_name)
        with self.accelerator.main_process_first():  # one process fills the cache of `datasets`
            dataset = load_point_dataset(*source)
        check_column(dataset, arguments.points_column)
        return dataset

    def _load_report_tables(self) -> list[PointTable]:
        """Shapes of the training split and of the held-out one."""
        arguments, tables = self.arguments, []
        for name in ("split", "eval_split"):
            try:
                table = load_point_table(
                    arguments.dataset,
                    getattr(arguments, name),
                    arguments.points_column,
                    arguments.label_column,
                    self.config.num_points,
                    arguments.seed,
                    arguments.dataset_config_name,
                )
                tables.append((getattr(arguments, name), table))
                check_disjoint([(split, table.checksums) for split, table in tables])
            except ValueError as error:
                raise ValueError(
                    f"`{name}` cannot be used for the report: {error} --no_evaluate trains without one."
                ) from error
        return [table for _, table in tables]

    def _build_model(self):
        arguments = self.arguments
        torch.manual_seed(arguments.seed)  # of weights that the source lacks
        if arguments.model_name_or_path is not None and self.checkpoint is None:
            self.raw_model = JointMAEForPreTraining.from_pretrained(
                arguments.model_name_or_path,
                config=self.config,
                dtype=torch.float32,  # whatever they were saved in
            )
            self.raw_model.train()
        else:
            self.raw_model = build_untrained_model(self.config, arguments.seed)
        self.raw_optimizer = build_optimizer(
            self.raw_model,
            arguments.learning_rate,
            arguments.weight_decay,
            (arguments.adam_beta1, arguments.adam_beta2),
        )
        self.threads = self._build_threads()
        if arguments.compile:
            compile_blocks(self.raw_model)
        self.model, self.optimizer = self.accelerator.prepare(self.raw_model, self.raw_optimizer)
        decay = arguments.ema_decay
        self.average = None if decay is None else WeightAverage(self.raw_model, decay)
        self.shared_encoder = list(self.raw_model.joint_mae.layers.parameters())
        # FSDP gathers gradients in a backward pass of its own, so single losses cannot be told apart there.
        self.is_sharded = any(is_spread(parameter) for parameter in self.raw_model.parameters())
        self.grad_norm_steps = 0 if self.is_sharded else arguments.grad_norm_steps
        config = self.config
        self.loss_weights = {"loss_3d": config.point_loss_weight}
        if config.use_image_branch:
            self.loss_weights["loss_2d"] = config.pixel_loss_weight
            if config.use_cross_loss:
                self.loss_weights["loss_cross"] = config.cross_loss_weight
        if config.agreement_loss_weight > 0:
            self.loss_weights["loss_agreement"] = config.agreement_loss_weight
        self.flops = training_flops(config)
        peak = peak_flops(self.accelerator.device, arguments.mixed_precision)
        self.peak = None if peak is None else peak * self.accelerator.num_processes
        # In the order in which a value that is not finite is blamed: the total comes after its terms.
        self.terms = [*self.loss_weights, "loss"]
        self.graphed = GraphedBackward(self.raw_model, self.model, self.terms) if arguments.cuda_graph else None

    def _build_threads(self) -> ReplicaThreads | None:
        """Threads that share the batches of a process on the CPU, where it has several and the model allows it."""
        config, threads = self.config, torch.get_num_threads()
        alone = self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1
        random = config.drop_path_rate > 0 or config.attention_probs_dropout_prob > 0
        divides = self.data.part_size % threads == 0
        if not alone or threads == 1 or random or not divides or self.arguments.compile:
            return None
        kind = AgreementThreads if config.agreement_loss_weight > 0 else ReplicaThreads
        return kind(self.raw_model, threads, self.accelerator.autocast)

    def _resume(self, checkpoint: Path) -> Progress:
        state = read_json(checkpoint / STATE)
        self._check_same_run(checkpoint, state)
        load_weights(checkpoint, self.raw_model, self.raw_optimizer)
        if self.average is not None:
            load_average(checkpoint, self.average)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        position = None
        if self.arguments.streaming:
            position = self.data.position = state["positions"][self.accelerator.process_index]
        return Progress(
            step=state["step"],
            seconds=state["seconds"],
            since_log=LossMeter(**state["since_log"]),
            last_epoch=LossMeter(**state["last_epoch"]),
            position=position,
        )

    def _prepare_output_dir(self):
        """Clears what an earlier run left, and sets the log back to the checkpoint: later steps are written again."""
        self.accelerator.wait_for_everyone()  # nobody still looks for a checkpoint
        if not self.is_main:
            return
        if not self.continues_here:
            remove_earlier_run(self.output_dir)
        remove_unfinished(self.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is not None:
            saved = self.checkpoint / LOG
            replace_text(self.output_dir / LOG, saved.read_text() if saved.exists() else "")
            if self.continues_here:
                abandon_checkpoints_after(self.checkpoint, self.progress.step)
            logger.info("Resuming from %s.", self.checkpoint)

    def _check_same_run(self, checkpoint: Path, state: dict[str, Any]):
        """Raises `ValueError`, naming the argument, if a checkpoint is of a run with other decisive arguments."""

        def refuse(name: str, value: Any, expected: Any):
            raise ValueError(
                f"`{name}` is {value!r}, but {checkpoint} was made with {expected!r}. Resume with the same value, or "
                "start a new run from its weights with --model_name_or_path."
            )

        if "arguments" not in state:
            raise ValueError(f"`resume_from_checkpoint` is {checkpoint}, which is not of a pre-training run.")
        names = DECISIVE + (("shuffle_buffer_size",) if self.arguments.streaming else ())
        if self.config.agreement_loss_weight > 0:  # these decide which shapes are compared with each other
            names += ("gradient_accumulation_steps",)
            if state.get("num_processes") != self.accelerator.num_processes:
                refuse("num_processes", self.accelerator.num_processes, state.get("num_processes"))
        for name in names:
            if getattr(self.arguments, name) != state["arguments"].get(name):
                refuse(name, getattr(self.arguments, name), state["arguments"].get(name))
        if self.fingerprint != state["dataset"]:
            name = "dataset" if self.arguments.train_data is None else "train_data"
            refuse(name, f"{getattr(self.arguments, name)} ({self.fingerprint})", state["dataset"])
        config = config_fields(self.config)
        for name, expected in config_fields(JointMAEConfig.from_pretrained(checkpoint)).items():
            if config[name] != expected:
                refuse(f"config.{name}", config[name], expected)

    # ---- Training

    def run(self) -> dict[str, Any] | None:
        with folder_of_one_run(self.output_dir) if self.is_main else nullcontext():
            return self._run()

    def _run(self) -> dict[str, Any] | None:
        self._prepare_output_dir()
        if self.arguments.report_to != "none":
            self.accelerator.init_trackers("joint-mae-pretraining", config=self._tracked_arguments())
        with self.stop_signals, closing(self._batches()) as batches:
            self._train(batches)
        model = self._final_model()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # nobody waits for the report, which may take longer than a barrier allows
        return self._finish(model) if self.is_main else None

    def _train(self, batches: Iterator):
        arguments, progress = self.arguments, self.progress
        started = time.perf_counter() - progress.seconds
        logged = (progress.step, progress.seconds)
        bar = tqdm(total=self.total_steps, initial=progress.step, disable=not self.is_main, unit="step")
        self.raw_model.train()
        for step in range(progress.step + 1, self.total_steps + 1):
            is_last = step == self.total_steps
            logs = step % arguments.logging_steps == 0 or is_last
            saves = is_last or (arguments.save_steps > 0 and step % arguments.save_steps == 0)
            measures = self.grad_norm_steps > 0 and (step == 1 or step % self.grad_norm_steps == 0)

            values, grad_norms = self._training_step(step, batches, measures)
            self.unread.append((step, values))
            stops = self._read_losses(everything=logs or saves or measures)
            if stops:
                self._read_losses(everything=True)
            progress.step = step
            progress.seconds = time.perf_counter() - started
            bar.set_postfix(self._postfix(bar), refresh=False)
            bar.update()

            if logs or measures:
                samples = (step - logged[0]) * arguments.batch_size
                self._log(step, grad_norms, samples / (progress.seconds - logged[1]))
                logged = (step, progress.seconds)
            if saves or stops:
                self._save()
            if stops and not is_last:
                bar.close()
                self._exit_on_signal()
        bar.close()

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any] | None]]:
        """The batches of this process from the current step on, on its device."""
        options: dict[str, Any] = {"pin_memory": self.on_gpu, "worker_init_fn": outlive_a_signal}
        if self.arguments.streaming:
            workers = min(self.num_workers, 1)  # several would read the stream in another order
            batches = iter(DataLoader(self.data, batch_size=None, num_workers=workers, **options))
        else:
            accumulation = self.layout["accumulation"]
            numbers = range(self.progress.step * accumulation, self.total_steps * accumulation)
            sampler = BatchSampler(numbers, self.data.batches_at_once, drop_last=False)
            loader = DataLoader(
                self.data, batch_sampler=sampler, collate_fn=list, num_workers=self.num_workers, **options
            )
            batches = chain.from_iterable(loader)
            if self.arguments.train_data is not None and self.data.deferred:
                device = self.accelerator.device
                batches = ((finish_batch(batch, device), position) for batch, position in batches)
        return prefetch(batches, self.accelerator.device, _BATCHES_AHEAD if self.on_gpu else 0)

    def _training_step(self, step: int, batches: Iterator, measures: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """
        One optimizer step.

        Returns:
            The losses of `self.terms`, the norm of the gradient, and whether any process wants to stop, in one tensor
            averaged over processes; and the gradient norms of the single losses if asked for.
        """
        accelerator, arguments = self.accelerator, self.arguments
        device, accumulation = accelerator.device, self.layout["accumulation"]
        torch.manual_seed(step_seed(arguments.seed, step, accelerator.process_index))
        set_learning_rate(self.raw_optimizer, self._learning_rate(step))
        total, grad_norms = torch.zeros(len(self.terms), device=device), {}
        for part in range(accumulation):
            batch, self.progress.position = next(batches)
            with accelerator.accumulate(self.model):
                if self.threads is not None and not measures:
                    total += self.threads.backward(batch, self.terms, 1 / accumulation) / accumulation
                    continue
                if self.graphed is not None and not measures:
                    total += self.graphed.backward(batch)
                    continue
                outputs = self.model(**batch)
                if measures and part == 0:
                    losses = {name: weight * outputs[name] for name, weight in self.loss_weights.items()}
                    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
                    grad_norms = loss_gradient_norms(losses, self.shared_encoder, scale)
                accelerator.backward(outputs.loss)
                total += torch.stack([outputs[name].detach().float() for name in self.terms]) / accumulation
        grad_norm = accelerator.clip_grad_norm_(self.raw_model.parameters(), arguments.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step)
        stop = torch.tensor(float(self.stop_signals.received is not None), device=device)
        values = torch.cat([total, torch.stack([whole(grad_norm).float().to(device), stop])])
        return accelerator.reduce(values, reduction="mean"), grad_norms

    def _read_losses(self, everything: bool) -> bool:
        """Takes account of the losses that are due; returns whether a process wants to stop."""
        stops = False
        while len(self.unread) > (0 if everything else self.lag):
            step, values = self.unread.popleft()
            *losses, grad_norm, stop = values.tolist()
            losses = dict(zip(self.terms, losses, strict=True))
            self._check_finite(step, losses, grad_norm)
            self.losses, self.grad_norm = losses, grad_norm
            self.progress.since_log.add(losses)
            if step > self.total_steps - self.final_steps:
                self.progress.last_epoch.add(losses)
            stops = stops or stop > 0
        return stops

    def _postfix(self, bar: tqdm) -> dict[str, str]:
        """What the progress bar shows beside the steps."""
        shown = {name: f"{value:.4f}" for name, value in self.losses.items()}
        shown["lr"] = f"{self._learning_rate(self.progress.step):.1e}"
        if bar.format_dict["rate"]:
            rate = bar.format_dict["rate"] * self.arguments.batch_size
            shown["samples/s"] = f"{rate:.0f}"
            shown["TFLOP/s"] = f"{rate * self.flops / 1e12:.3g}"
            if self.peak is not None:
                shown["of peak"] = f"{rate * self.flops / self.peak:.1%}"
        return shown

    def _check_finite(self, step: int, losses: dict[str, float], grad_norm: float):
        values = dict(losses)
        if self.accelerator.scaler is None:  # a scaler tries scales that are too large, and skips their steps
            values["gradient norm"] = grad_norm
        for name, value in values.items():
            if not math.isfinite(value):
                last = latest_checkpoint(self.output_dir)
                kept = "There is no checkpoint yet." if last is None else f"The last good checkpoint is {last}."
                raise NonFiniteLossError(
                    f"{name} is {value} at step {step}. Training stopped and saved nothing since. {kept}"
                )

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(step, self.total_steps, self.warmup_steps, self.arguments.learning_rate)

    def _log(self, step: int, grad_norms: dict[str, float], samples_per_second: float):
        """A line of the log: means since the last one."""
        epoch = None if self.steps_per_epoch is None else round(step / self.steps_per_epoch, 4)
        record: dict[str, Any] = {"step": step, "samples": step * self.arguments.batch_size, "epoch": epoch}
        record |= self.progress.since_log.mean()
        record |= {"grad_norm_" + name.removeprefix("loss_"): norm for name, norm in grad_norms.items()}
        record["grad_norm"] = self.grad_norm if math.isfinite(self.grad_norm) else None
        record["lr"] = self._learning_rate(step)
        record["samples_per_second"] = round(samples_per_second, 2)
        record["seconds"] = round(self.progress.seconds, 2)
        self.progress.since_log = LossMeter()
        if self.is_main:
            with (self.output_dir / LOG).open("a") as log:
                log.write(dumps(record) + "\n")
        tracked = {name: value for name, value in record.items() if name != "step" and value is not None}
        self.accelerator.log(tracked, step=step)

    def _save(self):
        progress = self.progress
        positions = gather_object([progress.position]) if self.arguments.streaming else None
        scaler = self.accelerator.scaler
        state = {
            "step": progress.step,
            "seconds": progress.seconds,
            "arguments": asdict(self.arguments),
            "dataset": self.fingerprint,
            "since_log": asdict(progress.since_log),
            "last_epoch": asdict(progress.last_epoch),
            "scaler": None if scaler is None else scaler.state_dict(),
            "positions": positions,
            "num_processes": self.accelerator.num_processes,
            "versions": versions(),
        }
        save_checkpoint(
            self.output_dir,
            progress.step,
            self.raw_model,
            JointMAEPointCloudProcessor.from_config(self.config),
            self.raw_optimizer,
            state,
            log=self.output_dir / LOG,
            average=self.average,
            writes=self.is_main,
        )
        if self.is_main:
            remove_old_checkpoints(self.output_dir, self.arguments.save_total_limit)
        self.accelerator.wait_for_everyone()

    # ---- Signals

    def _exit_on_signal(self):
        if self.is_main:
            logger.warning(
                "Stopped by %s after step %d; everything is in %s. Continue with --resume_from_checkpoint latest and "
                "the same arguments.",
                signal.Signals(self.stop_signals.number).name,
                self.progress.step,
                self.output_dir / f"checkpoint-{self.progress.step}",
            )
        self.accelerator.end_training()
        raise SystemExit(128 + self.stop_signals.number)

    # ---- The end

    def _final_model(self) -> JointMAEForPreTraining:
        """The model in one piece, for evaluation; all processes take part."""
        self.graphed = None  # nor its memory
        if self.average is not None:
            self.average.copy_to_model()
        if not self.is_sharded:
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            release_blocks(model)
            return model.eval()
        model = build_untrained_model(self.config, self.arguments.seed)
        model.load_state_dict(whole_weights(self.raw_model))
        return model.to(self.accelerator.device).eval()

    def _finish(self, model: JointMAEForPreTraining) -> dict[str, Any]:
        """Saves the model, evaluates it, and writes the result."""
        from ..evaluation.results import command_line, weights_digest

        arguments, progress = self.arguments, self.progress
        save_model_folder(model, JointMAEPointCloudProcessor.from_config(self.config), self.output_dir)
        samples_per_second = progress.step * arguments.batch_size / progress.seconds
        flops_per_second = samples_per_second * self.flops
        result = {
            "command": command_line(),
            "seed": arguments.seed,
            "arguments": asdict(arguments),
            "config": config_fields(self.config),
            "dataset": self.fingerprint,
            "versions": versions(),
            "git_commit": git_commit(),
            "device": device_name(self.accelerator.device),
            "num_processes": self.accelerator.num_processes,
            "steps": progress.step,
            "seconds": round(progress.seconds, 2),
            "samples_per_second": round(samples_per_second, 2),
            "flops_per_sample": round(self.flops),
            "flops_per_second": round(flops_per_second),
            "share_of_peak": None if self.peak is None else round(flops_per_second / self.peak, 4),
            "weights_digest": weights_digest(model.joint_mae),
            "weights": "of the last step" if self.average is None else "averaged over the steps",
            "final_losses": progress.last_epoch.mean(),
            "report": None,
        }
        replace_text(self.output_dir / RESULT, dumps(result, indent=2) + "\n")
        if self.evaluates:
            result["report"] = self._report(model)
            replace_text(self.output_dir / RESULT, dumps(result, indent=2) + "\n")
        logger.info("The model and %s are in %s.\n\n%s\n", RESULT, self.output_dir, summarize(result))
        if arguments.push_to_hub:
            self._push_to_hub()
        return result

    def _report(self, model: JointMAEForPreTraining) -> dict[str, Any]:
        from ..evaluation import pretraining_report

        untrained = build_untrained_model(self.config, self.arguments.seed).to(self.accelerator.device).eval()
        return pretraining_report(model, untrained, *self.report_tables, self.output_dir, self.arguments.seed)

    def _push_to_hub(self):
        from huggingface_hub import HfApi

        arguments, api = self.arguments, HfApi()
        api.create_repo(arguments.hub_model_id, private=arguments.hub_private_repo, exist_ok=True)
        url = api.upload_folder(
            repo_id=arguments.hub_model_id,
            folder_path=self.output_dir,
            ignore_patterns=[LOCK, "checkpoint-*", "abandoned-checkpoint-*", "*.partial*", f"{_TRACKERS}/*"],
            commit_message=f"Pre-trained for {self.progress.step} steps",
        )
        logger.info("Uploaded to %s.", url)

    def _tracked_arguments(self) -> dict[str, Any]:
        """Arguments as trackers take them: numbers, strings and booleans."""
        return {name: "none" if value is None else value for name, value in asdict(self.arguments).items()}


def first_cloud_checksum(dataset: Any, points_column: str) -> int | None:
    """CRC-32 of the first cloud of a stream, `None` of an empty one: what tells it from another of the same name."""
    row = next(iter(dataset), None)
    return None if row is None else zlib.crc32(np.asarray(row[points_column], dtype=np.float32).tobytes())


def build_untrained_model(config: JointMAEConfig, seed: int) -> JointMAEForPreTraining:
    """A new model in training mode; its weights are a function of configuration and seed."""
    torch.manual_seed(seed)
    return JointMAEForPreTraining(config).train()


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Seed of torch's generator for one optimizer step of one process."""
    return int(counter_generator(seed, STEPS, step, process_index).integers(2**63))


def remove_earlier_run(output_dir: Path):
    """Removes checkpoints, log, result and model of an earlier run; other files stay."""
    remove_unfinished(output_dir)
    for path in [*list_checkpoints(output_dir), *output_dir.glob("abandoned-checkpoint-*")]:
        shutil.rmtree(path)
    shutil.rmtree(output_dir / _TRACKERS, ignore_errors=True)
    model_files = (MODEL, "config.json", "preprocessor_config.json", "*_joint_mae.py")
    for pattern in (LOG, RESULT, *model_files, "reconstructions.png"):
        for file in output_dir.glob(pattern):
            file.unlink()


def config_fields(config: JointMAEConfig) -> dict[str, Any]:
    """The fields that Joint-MAE adds to a configuration, as JSON has them; names of classes decide nothing."""
    names = sorted(own_fields() - {"object_classes"})
    return loads(dumps({name: getattr(config, name) for name in names}))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in ("jointmae_hf", "torch", "transformers", "accelerate", "datasets", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its source folder
            continue
    return found


def device_name(device: torch.device) -> str:
    """What the run computed on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(num_processes: int):
    """
    Refuses a launch whose processes did not join: each would do all of the work, and write the same files.

    Args:
        num_processes: how many work together.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise ValueError(
            f"{launched} processes were launched, but {num_processes} work together. Without a GPU, launch with "
            "ACCELERATE_USE_CPU=true in the environment."
        )


def share_cores(num_processes: int, num_threads: int | None = None):
    """Sets torch's threads: as many as told, else the cores shared out among the processes of this machine."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    torch.set_num_threads(num_threads or max(1, available_cores() // local_processes))


@cache
def git_commit() -> str | None:
    """
    Commit of the source, where it runs from its clone: that at the first call, so one comes before the work. With
    `-dirty` if code differs from it; results and documents may.
    """
    clone = Path(__file__).parents[2]
    code = ("jointmae_hf", "examples", "benchmarks/*.py", ":!examples/results")

    def git(*words: str) -> str:
        command = ["git", "-C", str(clone), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A package that is installed inside some other clone is no file of that.
        git("ls-files", "--error-unmatch", "jointmae_hf/training/pretraining.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("diff", "--name-only", "HEAD", "--", *code) else "")
    except (OSError, subprocess.SubprocessError):
        return None
