"""Fine-tuning of Joint-MAE for classification and part segmentation, on Accelerate.

Notable choices:

- As in pre-training, a run is a pure function of its arguments: batches depend on (seed, epoch, indices), and torch's
  generator is seeded anew at each step. A run that was killed and resumed ends in the same weights.
- The last checkpoint is the result. The best one on a validation part of the training split is kept and measured too,
  under a name of its own; the test split is looked at once, after the last step.
- On a CPU each thread encodes a slice of the batch, and the head gets it in one piece, for its batch normalisation and
  dropout.
"""

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import ModelOutput

from .. import (
    JointMAEConfig,
    JointMAEForPartSegmentation,
    JointMAEForPointCloudClassification,
    JointMAEPointCloudProcessor,
)
from ..data.augmentation import SAMPLES, Augmentation, apply_affine, counter_generator, normalize_clouds, subsample
from ..data.collation import EpochBatches, move_batch
from ..data.labelled import LabelledClouds, load_labelled_splits, stratified_rows, validation_rows
from ..data.loading import fixed_subsample
from ..evaluation.classification import predict_logits, vote
from ..evaluation.few_shot import draw_fold
from ..evaluation.histograms import random_forest, shape_histograms
from ..evaluation.linear_svm import accuracies
from ..evaluation.part_forest import NUM_TREES, POINTS_OF_A_SHAPE, PartForest
from ..evaluation.results import (
    TASKS,
    TaskResult,
    origin,
    provenance,
    reading,
    summarize_runs,
    weights_digest,
    write_result,
)
from ..evaluation.segmentation import class_parts, segment_clouds, segmentation_metrics
from ..files import replace_text
from .arguments import parse_config_overrides
from .checkpoints import (
    LOCK,
    LOG,
    STATE,
    folder_of_one_run,
    latest_checkpoint,
    load_weights,
    read_json,
    remove_old_checkpoints,
    remove_unfinished,
    save_checkpoint,
    save_model_folder,
)
from .finetuning_arguments import ClassificationArguments, FineTuningArguments, SegmentationArguments
from .optimization import build_optimizer, learning_rate_at, set_learning_rate
from .pretraining import (
    RESULT,
    LossMeter,
    NonFiniteLossError,
    check_processes,
    config_fields,
    git_commit,
    share_cores,
    step_seed,
)
from .sharding import is_spread
from .signals import StopSignals, outlive_a_signal
from .threads import EncoderThreads


logger = logging.getLogger(__name__)

BEST = "best"
_METRICS = "metrics.json"
_BETAS = (0.9, 0.999)
# Arguments that do not decide what a run learns; all others must be the same when it is resumed.
_NEUTRAL = {
    "dataset",  # compared by content
    "model_name_or_path",  # compared by weights
    "num_workers",
    "num_threads",
    "seeds",
    "voting",
    "output_dir",
    "overwrite_output_dir",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
}


def finetune_classification(arguments: ClassificationArguments) -> TaskResult | None:
    """
    Fine-tunes a classifier at each seed, measures it on the test split, and writes the result.

    Returns:
        What `result.json` in the output folder holds; `None` in all but the main process.

    Raises:
        ValueError: for arguments or data that cannot be used.
        FileExistsError: if the output folder holds something and neither resuming nor overwriting was asked for.
        CheckpointError: if all checkpoints to resume from are damaged.
        NonFiniteLossError: if the loss stopped being finite.
        SystemExit: with code 128 + signal, after SIGINT or SIGTERM and the checkpoint that they cause.
    """
    return _finetune(ClassificationTuner, arguments)


def finetune_segmentation(arguments: SegmentationArguments) -> TaskResult | None:
    """Fine-tunes part segmentation; all else as [`finetune_classification`]."""
    return _finetune(SegmentationTuner, arguments)


class LabelledCollator:
    """
    Makes the inputs of a head from raw clouds and their labels: subsample, normalise, augment.

    Args:
        data: the training shapes.
        num_points: points of a subsample.
        augmentation: the random map of each sample.
        seed: seed of the run.
        part_labels: whether the labels are those of the points, and the class is an input.
        use_object_class: whether that input is given.
    """

    def __init__(
        self,
        data: LabelledClouds,
        num_points: int,
        augmentation: Augmentation,
        seed: int,
        part_labels: bool = False,
        use_object_class: bool = False,
    ):
        self.data = data
        self.num_points = num_points
        self.augmentation = augmentation
        self.seed = seed
        self.part_labels = part_labels
        self.use_object_class = use_object_class

    def __call__(self, clouds: Sequence[np.ndarray], keys: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """
        Args:
            clouds: one `(n, 3)` array a sample.
            keys: (epoch, index) of each sample.

        Returns:
            `point_values`, `labels` and, if the network is told, `object_class`.
        """
        points = np.empty((len(clouds), self.num_points, 3), dtype=np.float32)
        parts = np.empty((len(clouds), self.num_points), dtype=np.int64)
        matrix, shift = np.empty((len(clouds), 3, 3)), np.empty((len(clouds), 3))
        for row, (cloud, (epoch, index)) in enumerate(zip(clouds, keys, strict=True)):
            generator = counter_generator(self.seed, SAMPLES, epoch, index)
            chosen = subsample(generator, len(cloud), self.num_points)
            points[row] = cloud[chosen]
            if self.part_labels:
                parts[row] = self.data.parts(index)[chosen]
            matrix[row], shift[row] = self.augmentation.draw(generator)
        points = torch.from_numpy(apply_affine(normalize_clouds(points), matrix, shift))
        classes = torch.from_numpy(self.data.labels[[index for _, index in keys]])
        batch = {"point_values": points, "labels": torch.from_numpy(parts) if self.part_labels else classes}
        if self.use_object_class:
            batch["object_class"] = classes
        return batch


class FineTuner:
    """One run of fine-tuning with one seed, in a folder of its own; see [`finetune_classification`]."""

    task: str

    def __init__(self, arguments: FineTuningArguments, seed: int, data: tuple[LabelledClouds, LabelledClouds]):
        self.arguments = arguments
        self.seed = seed
        self.output_dir = Path(arguments.output_dir) / f"seed-{seed}"
        self.accelerator = _build_accelerator(arguments)
        self.is_main = self.accelerator.is_main_process
        self._split(*data)
        self._build_model()
        self.step, self.seconds, self.best = 0, 0.0, None
        self.origins = [origin(self.accelerator.device)]
        self.since_log = LossMeter()
        self.stop_signals = StopSignals()
        self.checkpoint = None
        if arguments.resume_from_checkpoint is not None:
            self.checkpoint = latest_checkpoint(self.output_dir)
        if self.checkpoint is not None:
            self._resume(self.checkpoint)

    # ---- What differs between tasks

    def build_config(self) -> JointMAEConfig:
        """The configuration with what the head needs."""
        raise NotImplementedError

    def build_collator(self) -> LabelledCollator:
        raise NotImplementedError

    def measure(self, data: LabelledClouds) -> dict[str, float]:
        """Metrics of the model as it is, in percent."""
        raise NotImplementedError

    def measure_more(self) -> dict[str, float]:
        """Metrics on the test split that are reported beside those of the last step."""
        return {}

    # ---- Preparation

    @cached_property
    def num_points(self) -> int:
        """Points of a cloud that the network is given."""
        return min(self.arguments.num_points, self.all_train.clouds.largest_size)

    def _split(self, train: LabelledClouds, test: LabelledClouds):
        arguments = self.arguments
        self.all_train, self.test = train, test
        rows = stratified_rows(train.labels, arguments.train_fraction, self.seed)
        kept, held_out = validation_rows(train.labels[rows], arguments.validation_fraction, self.seed)
        self.train = train.select(rows[kept])
        self.judge = test if arguments.choose_on_test else train.select(rows[held_out]) if len(held_out) else None
        self.split_sizes = {"train": len(kept), "validation": len(held_out), "test": len(test)}
        parts = self.accelerator.num_processes * arguments.gradient_accumulation_steps
        self.batch_size = min(arguments.batch_size, len(kept) // parts * parts)
        if self.batch_size < arguments.batch_size and self.is_main:
            logger.info("There are %d training shapes: the batch size is %d.", len(kept), self.batch_size)
        self.data = EpochBatches(
            self.train.clouds,
            self.build_collator(),
            self.batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            arguments.gradient_accumulation_steps,
        )
        self.steps_per_epoch = self.data.steps_per_epoch
        self.total_steps = arguments.max_steps or max(1, round(arguments.epochs * self.steps_per_epoch))
        self.warmup_steps = round(arguments.warmup_ratio * self.total_steps)
        self.eval_steps = max(1, round(arguments.eval_epochs * self.steps_per_epoch))

    def _build_model(self):
        arguments = self.arguments
        self.config = self.build_config()
        torch.manual_seed(self.seed)
        if arguments.from_scratch:
            self.raw_model = self.model_class(self.config)
        elif self.model_class.__name__ in (self.config.architectures or ()):  # as those of its source
            # What its head has learned is another task, and often of another size: only the encoder is taken on.
            self.raw_model = self.model_class(self.config)
            source = self.model_class.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
            self.raw_model.joint_mae.load_state_dict(source.joint_mae.state_dict())
        else:
            self.raw_model = self.model_class.from_pretrained(
                arguments.model_name_or_path,
                config=self.config,
                dtype=torch.float32,  # whatever they were saved in
            )
        self.initial_weights = weights_digest(self.raw_model.joint_mae)
        self.is_frozen = arguments.head != "full"
        if self.is_frozen:
            self.raw_model.joint_mae.requires_grad_(False)
        self.raw_optimizer = build_optimizer(
            self.raw_model, arguments.learning_rate, arguments.weight_decay, _BETAS, arguments.encoder_lr_scale
        )
        self.threads = self._build_threads()
        self.model, self.optimizer = self.accelerator.prepare(self.raw_model, self.raw_optimizer)
        if any(is_spread(parameter) for parameter in self.raw_model.parameters()):
            raise ValueError(
                "fine-tuning does not spread weights over processes (FSDP), expected a launch without it."
            )

    def _build_threads(self) -> EncoderThreads | None:
        """Threads that share the encoder's batches on the CPU, where there are several and the model allows it."""
        config, threads = self.config, torch.get_num_threads()
        if self.accelerator.device.type != "cpu" or self.accelerator.num_processes > 1 or threads == 1:
            return None
        if not self.is_frozen and (config.drop_path_rate > 0 or config.attention_probs_dropout_prob > 0):
            logger.info("Threads work inside operators: the encoder draws random numbers, in one order for a batch.")
            return None
        encoder = self.raw_model.joint_mae.train(not self.is_frozen)
        return EncoderThreads(encoder, threads, self.accelerator.autocast)

    def _base_config(self, **fields: Any) -> JointMAEConfig:
        arguments = self.arguments
        if arguments.model_name_or_path is not None:
            config = JointMAEConfig.from_pretrained(arguments.model_name_or_path)
        else:
            config = JointMAEConfig.from_preset(arguments.preset)
        overrides = parse_config_overrides(arguments.config_overrides or "")
        return JointMAEConfig(**{**config.to_dict(), **fields, **overrides})

    def _resume(self, checkpoint: Path):
        state = read_json(checkpoint / STATE)
        self._check_same_run(checkpoint, state)
        load_weights(checkpoint, self.raw_model, self.raw_optimizer)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.since_log = LossMeter(**state["since_log"])
        self.origins = state["origins"] + [own for own in self.origins if own not in state["origins"]]

    def _check_same_run(self, name: Path, state: dict[str, Any]):
        """Raises `ValueError`, naming the argument, if a state is of a run that learned something else."""
        if "identity" not in state:
            raise ValueError(f"`resume_from_checkpoint` is 'latest', but {name} is not of a fine-tuning run.")
        for key, value in self._identity().items():
            if value != state["identity"].get(key):
                raise ValueError(
                    f"`{key}` is {value!r}, but {name} was made with {state['identity'].get(key)!r}. Resume with the "
                    "same value, or choose another --output_dir."
                )

    def _identity(self) -> dict[str, Any]:
        """What decides the outcome of a run, for JSON."""
        decisive = {name: value for name, value in asdict(self.arguments).items() if name not in _NEUTRAL}
        decisive["dataset"] = [self.all_train.fingerprint(), self.test.fingerprint()]
        decisive["initial_weights"] = self.initial_weights
        decisive["config"] = config_fields(self.config)
        decisive["num_processes"] = self.accelerator.num_processes  # each normalises its own part of a batch
        return json.loads(json.dumps(decisive))

    # ---- Training

    def run(self) -> dict[str, Any] | None:
        """Trains, keeps the last and the best model, and returns the metrics; `None` in all but the main process."""
        finished = self._finished()
        if finished is not None:
            logger.info("Seed %d is done: %s.", self.seed, self.output_dir / _METRICS)
            return finished
        if self.is_main:
            self._prepare_output_dir()
        with self.stop_signals:
            self._train()
        if self.stop_signals.received is not None and self.accelerator.num_processes == 1:
            self._exit_on_signal()
        record = self._finish() if self.is_main else None
        self.accelerator.wait_for_everyone()
        return record

    def _finished(self) -> dict[str, Any] | None:
        """The metrics of an earlier run of this seed that came to its end, when resuming."""
        file = self.output_dir / _METRICS
        if self.arguments.resume_from_checkpoint is None or not file.exists():
            return None
        record = read_json(file)
        self._check_same_run(file, record)
        wanted_votes = getattr(self.arguments, "voting", 0)
        return record if wanted_votes == record["voting"] else None

    def _prepare_output_dir(self):
        self.output_dir.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.output_dir)
        if self.checkpoint is not None:
            saved = self.checkpoint / LOG
            replace_text(self.output_dir / LOG, saved.read_text() if saved.exists() else "")
            logger.info("Resuming from %s.", self.checkpoint)
        else:
            (self.output_dir / LOG).unlink(missing_ok=True)

    def _train(self):
        arguments = self.arguments
        batches = self._batches()
        started = time.perf_counter() - self.seconds
        name = f"seed {self.seed}"
        bar = tqdm(total=self.total_steps, initial=self.step, disable=not self.is_main, unit="step", desc=name)
        self._train_mode()
        for step in range(self.step + 1, self.total_steps + 1):
            is_last = step == self.total_steps
            loss, grad_norm, stops = self._training_step(step, batches)
            self._check_finite(step, loss, grad_norm)
            self.step, self.seconds = step, time.perf_counter() - started
            self.since_log.add({"loss": loss})
            bar.set_postfix(self._postfix(loss), refresh=False)
            bar.update()
            if self.is_main and (step % arguments.logging_steps == 0 or is_last):
                self._log(grad_norm)
            if self.judge is not None and (step % self.eval_steps == 0 or is_last):
                self._evaluate()
            if stops or is_last or (arguments.save_steps > 0 and step % arguments.save_steps == 0):
                self._save()
            if stops:
                bar.close()
                self._exit_on_signal()
        self.seconds = time.perf_counter() - started
        bar.close()

    def _train_mode(self):
        self.raw_model.train()
        if self.is_frozen:
            self.raw_model.joint_mae.eval()

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], None]]:
        """The batches of this process from the current step on."""
        accumulation = self.arguments.gradient_accumulation_steps
        sampler = range(self.step * accumulation, self.total_steps * accumulation)
        options = {"num_workers": self.arguments.num_workers, "worker_init_fn": outlive_a_signal}
        return iter(DataLoader(self.data, batch_size=None, sampler=sampler, **options))

    def _training_step(self, step: int, batches: Iterator) -> tuple[float, float, bool]:
        """One optimizer step: the loss, the norm of the gradient, and whether any process wants to stop."""
        accelerator, arguments = self.accelerator, self.arguments
        device, accumulation = accelerator.device, arguments.gradient_accumulation_steps
        torch.manual_seed(step_seed(self.seed, step, accelerator.process_index))
        set_learning_rate(self.raw_optimizer, self._learning_rate(step))
        total = torch.zeros((), device=device)
        for _ in range(accumulation):
            batch, _ = next(batches)
            batch = move_batch(batch, device)
            with accelerator.accumulate(self.model):
                if self.threads is not None:
                    loss = self.threads.backward(
                        batch["point_values"], partial(self._head_loss, batch), 1 / accumulation
                    )
                else:
                    loss = self.model(**batch).loss
                    accelerator.backward(loss)
                total += loss.detach().float() / accumulation
        trained = [parameter for parameter in self.raw_model.parameters() if parameter.requires_grad]
        grad_norm = accelerator.clip_grad_norm_(trained, arguments.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        stop = torch.tensor(float(self.stop_signals.received is not None), device=device)
        values = torch.stack([total, grad_norm.detach().float().to(device), stop])
        loss, grad_norm, stop = accelerator.reduce(values, reduction="mean").tolist()
        return loss, grad_norm, stop > 0

    def _head_loss(self, batch: dict[str, torch.Tensor], encoder_outputs: ModelOutput) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.raw_model(**batch, encoder_outputs=encoder_outputs).loss

    def _check_finite(self, step: int, loss: float, grad_norm: float):
        scales = self.accelerator.scaler is not None  # a scaler tries scales that are too large, and skips their steps
        for name, value in (("the loss", loss), ("the gradient norm", 0.0 if scales else grad_norm)):
            if not math.isfinite(value):
                raise NonFiniteLossError(f"{name} is {value} at step {step} of seed {self.seed}.")

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(step, self.total_steps, self.warmup_steps, self.arguments.learning_rate)

    def _postfix(self, loss: float) -> dict[str, str]:
        shown = {"loss": f"{loss:.4f}", "epoch": f"{self.step / self.steps_per_epoch:.1f}"}
        if self.best is not None:
            shown["best"] = f"{self.best['value']:.1f}"
        return shown

    def _log(self, grad_norm: float):
        record = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            **self.since_log.mean(),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": self._learning_rate(self.step),
            "seconds": round(self.seconds, 2),
        }
        self.since_log = LossMeter()
        self._append_to_log(record)

    def _append_to_log(self, record: dict[str, Any]):
        with (self.output_dir / LOG).open("a") as log:
            log.write(json.dumps(record) + "\n")

    def _evaluate(self):
        """Measures on the validation part, and keeps the model if it is the best so far."""
        if self.is_main:
            metrics = self.measure(self.judge)
            self._append_to_log({"step": self.step, "test" if self.judge is self.test else "validation": metrics})
            value = metrics[TASKS[self.task]]
            if self.best is None or value > self.best["value"]:
                self.best = {"step": self.step, "value": value}
                self._save_model(self._best_folder())
            self._train_mode()
        self.accelerator.wait_for_everyone()

    def _save(self):
        if self.is_main:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "since_log": asdict(self.since_log),
                "identity": self._identity(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "origins": self.origins,
            }
            save_checkpoint(
                self.output_dir,
                self.step,
                self.raw_model,
                self._processor(),
                self.raw_optimizer,
                state,
                log=self.output_dir / LOG,
            )
            remove_old_checkpoints(self.output_dir, self.arguments.save_total_limit)
            self._keep_best()
        self.accelerator.wait_for_everyone()

    def _best_folder(self) -> Path:
        """Named by its step until the end, so that a run that goes on from a checkpoint finds the best of that."""
        return self.output_dir / f"{BEST}-{self.best['step']}"

    def _keep_best(self):
        """Removes the models that were the best before, or would have been of steps that were lost."""
        for folder in self.output_dir.glob(f"{BEST}-*"):
            if self.best is None or folder != self._best_folder():
                shutil.rmtree(folder)

    def _save_model(self, folder: Path):
        save_model_folder(self.raw_model, self._processor(), folder)

    def _processor(self) -> JointMAEPointCloudProcessor:
        return JointMAEPointCloudProcessor.from_config(self.config, num_points=self.num_points)

    def _exit_on_signal(self):
        if self.is_main:
            logger.warning(
                "Stopped by %s after step %d of seed %d. Continue with --resume_from_checkpoint latest and the same "
                "arguments.",
                signal.Signals(self.stop_signals.number).name,
                self.step,
                self.seed,
            )
        self.accelerator.end_training()
        raise SystemExit(128 + self.stop_signals.number)

    # ---- The end

    def _finish(self) -> dict[str, Any]:
        """Saves the last model, measures it on the test split, and then the best one."""
        started = time.perf_counter()
        self._save_model(self.output_dir)
        self.raw_model.eval()
        metrics = {**self.measure(self.test), **self.measure_more()}
        if self.best is not None:
            suffix = "_chosen_on_test" if self.arguments.choose_on_test else "_best_on_validation"
            last = {name: tensor.clone() for name, tensor in self.raw_model.state_dict().items()}
            folder = self.output_dir / BEST
            if self._best_folder().exists():  # else this is not the first time that these steps come to their end
                if folder.exists():
                    shutil.rmtree(folder)
                self._best_folder().rename(folder)
            best = self.model_class.from_pretrained(folder)
            self.raw_model.load_state_dict(best.state_dict())
            metrics[TASKS[self.task] + suffix] = self.measure(self.test)[TASKS[self.task]]
            self.raw_model.load_state_dict(last)
        record = {
            "seed": self.seed,
            "metrics": metrics,
            "best": self.best,
            "steps": self.step,
            "batch_size": self.batch_size,
            "num_points": self.num_points,
            "split_sizes": self.split_sizes,
            "classes": len(self.all_train.class_names),
            "initial_weights": self.initial_weights,
            "final_weights": weights_digest(self.raw_model),
            "parameters": sum(p.numel() for p in self.raw_model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.raw_model.parameters() if p.requires_grad),
            "voting": getattr(self.arguments, "voting", 0),
            "seconds": round(self.seconds, 2),
            "seconds_of_evaluation": round(time.perf_counter() - started, 2),
            "origins": self.origins,
            "identity": self._identity(),
        }
        replace_text(self.output_dir / _METRICS, json.dumps(record, indent=2) + "\n")
        return record


class ClassificationTuner(FineTuner):
    """Fine-tunes [`JointMAEForPointCloudClassification`]."""

    task = "classification"
    model_class = JointMAEForPointCloudClassification

    def build_config(self) -> JointMAEConfig:
        names = dict(enumerate(self.all_train.class_names))
        depths = {"linear": 1, "mlp": JointMAEConfig().classifier_num_layers}
        head = self.arguments.head
        layers = {"classifier_num_layers": depths[head]} if head in depths else {}
        return self._base_config(id2label=names, label2id={name: i for i, name in names.items()}, **layers)

    def build_collator(self) -> LabelledCollator:
        return LabelledCollator(self.train, self.num_points, self.arguments.recipe(), self.seed)

    def measure(self, data: LabelledClouds) -> dict[str, float]:
        points = fixed_subsample(data.clouds, self.num_points, self.seed)
        return accuracies(predict_logits(self.raw_model, points).argmax(1), data.labels)

    def measure_more(self) -> dict[str, float]:
        votes, test = self.arguments.voting, self.test
        if votes == 0:
            return {}
        scores = vote(self.raw_model, test.clouds, self.num_points, self.arguments.recipe(), votes, self.seed)
        return {"accuracy_voted": accuracies(scores.argmax(1), test.labels)["accuracy"]}


class SegmentationTuner(FineTuner):
    """Fine-tunes [`JointMAEForPartSegmentation`]."""

    task = "part_segmentation"
    model_class = JointMAEForPartSegmentation

    def build_config(self) -> JointMAEConfig:
        names = dict(enumerate(self.all_train.part_names))
        label2id = {name: i for i, name in names.items()}
        classes = self.all_train.class_names if self.arguments.use_object_class else None
        told = {"num_object_classes": len(classes or []), "object_classes": classes}
        return self._base_config(id2label=names, label2id=label2id, **told)

    def build_collator(self) -> LabelledCollator:
        told = self.arguments.use_object_class
        return LabelledCollator(self.train, self.num_points, self.arguments.recipe(), self.seed, True, told)

    @cached_property
    def allowed_parts(self) -> tuple[np.ndarray, np.ndarray]:
        """What each class can consist of: as far as was learned, for predictions, and in truth, for the score."""
        return known_parts(self.train), known_parts(self.all_train)

    def measure(self, data: LabelledClouds) -> dict[str, float]:
        told = self.arguments.use_object_class
        return measure_parts(self.raw_model, data, self.num_points, told, *self.allowed_parts, self.seed)


def known_parts(data: LabelledClouds) -> np.ndarray:
    """The parts that each class has in these shapes, boolean `(classes, parts)`; of a class without any, all."""
    parts = [data.parts(index) for index in range(len(data))]
    found = class_parts(parts, data.labels, len(data.class_names), len(data.part_names))
    return np.where(found.any(1, keepdims=True), found, True)


def measure_parts(
    model: JointMAEForPartSegmentation | PartForest,
    data: LabelledClouds,
    num_points: int,
    use_object_class: bool,
    predictable_parts: np.ndarray,
    scored_parts: np.ndarray,
    seed: int,
    progress: str | None = None,
) -> dict[str, float]:
    """
    Metrics of part segmentation, in percent.

    Args:
        model: gives the scores.
        data: shapes to measure on.
        num_points: points of each that the model is given, drawn by `seed`.
        use_object_class: whether the class of a shape is known: then it decides which parts may be predicted.
        predictable_parts: boolean `(classes, parts)`: those.
        scored_parts: likewise, those over which the intersection over union is averaged.
        seed: fixes the subsamples.
        progress: name of a progress bar over the batches; none is shown when left out.
    """
    clouds = [data.clouds[index] for index in range(len(data))]
    parts = [data.parts(index) for index in range(len(data))]
    given = (data.labels, predictable_parts if use_object_class else None)
    found = segment_clouds(model, clouds, num_points, *given, seed=seed, progress=progress)
    return segmentation_metrics(found, parts, data.labels, scored_parts)


def _finetune(tuner_class: type[FineTuner], arguments: FineTuningArguments) -> TaskResult | None:
    git_commit()  # the clone may move on while this runs
    output_dir = Path(arguments.output_dir)
    accelerator = _build_accelerator(arguments)
    arguments = replace(
        arguments,
        mixed_precision=accelerator.mixed_precision,
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
    )
    _check_output_dir(output_dir, arguments)
    accelerator.wait_for_everyone()  # nobody still looks at the folder
    with folder_of_one_run(output_dir) if accelerator.is_main_process else nullcontext():
        return _run_seeds(tuner_class, arguments, accelerator, output_dir)


def _run_seeds(
    tuner_class: type[FineTuner], arguments: FineTuningArguments, accelerator: Accelerator, output_dir: Path
) -> TaskResult | None:
    if arguments.overwrite_output_dir and arguments.resume_from_checkpoint is None and accelerator.is_main_process:
        _remove_earlier_run(output_dir)
    splits = (arguments.train_split, arguments.test_split)
    columns = (arguments.points_column, arguments.label_column, getattr(arguments, "part_column", None))
    with accelerator.main_process_first():  # one process fills the cache of `datasets`
        data = load_labelled_splits(arguments.dataset, splits, *columns, arguments.dataset_config_name)
    is_few_shot = getattr(arguments, "ways", 0) > 0
    is_forest = arguments.baseline == "random_forest"
    runs = []
    for seed in arguments.seeds:
        shapes = _fold(arguments, data, seed) if is_few_shot else data
        if is_forest:
            found = _run_forest(arguments, seed, *shapes, accelerator.is_main_process)
            runs.append(found | {"origins": [origin(accelerator.device)]})
        else:
            runs.append(tuner_class(arguments, seed, shapes).run())
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    result = TaskResult(
        task="few_shot" if is_few_shot else tuner_class.task,
        model=_describe_model(arguments, runs),
        dataset={
            "name": arguments.dataset,
            "config_name": arguments.dataset_config_name,
            "splits": {name: part.fingerprint() for name, part in zip(splits, data, strict=True)},
        },
        split_sizes={**runs[0]["split_sizes"], "classes": runs[0]["classes"]},
        seeds=arguments.seeds,
        metrics=summarize_runs([run["metrics"] for run in runs]),
        protocol=_protocol(arguments, runs[0]),
        settings={
            **asdict(arguments),
            **({"num_points_used": runs[0]["num_points"]} if is_forest else _settings_of_training(runs)),
            "num_processes": accelerator.num_processes,
        },
        chosen_on_test=arguments.choose_on_test,
        **provenance(
            [each for run in runs for each in run["origins"]],
            sum(run["seconds"] + run.get("seconds_of_evaluation", 0.0) for run in runs),
        ),
    )
    write_result(result, output_dir / RESULT)
    logger.info("Models and %s are in %s.", RESULT, output_dir)
    accelerator.end_training()
    return result


def _fold(
    arguments: ClassificationArguments, data: tuple[LabelledClouds, LabelledClouds], seed: int
) -> tuple[LabelledClouds, LabelledClouds]:
    """The shapes of a few-shot fold, with its classes counted from 0."""
    train, test = data
    fold = draw_fold(train.labels, test.labels, arguments.ways, arguments.shots, arguments.queries, seed)
    classes = np.sort(fold.classes)
    parts = train.select(fold.support), test.select(fold.queries)
    for part in parts:
        part.labels = np.searchsorted(classes, part.labels)
        part.class_names = [train.class_names[label] for label in classes]
    return parts


def _run_forest(
    arguments: FineTuningArguments, seed: int, train: LabelledClouds, test: LabelledClouds, show_progress: bool
) -> dict[str, Any]:
    """The baseline on the shapes that a network would be trained on."""
    started = time.perf_counter()
    rows = stratified_rows(train.labels, arguments.train_fraction, seed)
    kept, held_out = validation_rows(train.labels[rows], arguments.validation_fraction, seed)
    learned = train.select(rows[kept])
    if isinstance(arguments, SegmentationArguments):
        metrics, num_points = _segment_by_forest(arguments, seed, learned, train, test, show_progress)
    else:
        num_points = min(arguments.num_points, train.clouds.largest_size)
        features = [shape_histograms(fixed_subsample(part.clouds, num_points, seed), seed) for part in (learned, test)]
        metrics = accuracies(random_forest(features[0], learned.labels, features[1], seed), test.labels)
    return {
        "metrics": metrics,
        "split_sizes": {"train": len(kept), "validation": len(held_out), "test": len(test)},
        "classes": len(train.class_names),
        "num_points": num_points,
        "seconds": time.perf_counter() - started,
    }


def _segment_by_forest(
    arguments: SegmentationArguments,
    seed: int,
    learned: LabelledClouds,
    train: LabelledClouds,
    test: LabelledClouds,
    show_progress: bool,
) -> tuple[dict[str, float], int]:
    """Metrics of the forest on points, and how many points of a cloud it is given."""
    num_points = min(arguments.num_points, train.clouds.largest_size)
    told = arguments.use_object_class
    as_drawn = Augmentation((1, 1), 0.0, "none")
    batch = LabelledCollator(learned, num_points, as_drawn, seed, part_labels=True, use_object_class=told)(
        [learned.clouds[index] for index in range(len(learned))], [(0, index) for index in range(len(learned))]
    )
    forest = PartForest(len(train.part_names), len(train.class_names) if told else 0, seed)
    train_bar, test_bar = (f"seed {seed}, {name}" if show_progress else None for name in ("train", "test"))
    forest.fit(batch["point_values"], batch["labels"], batch.get("object_class"), train_bar)
    parts = known_parts(learned), known_parts(train)
    return measure_parts(forest, test, num_points, told, *parts, seed, test_bar), num_points


def _describe_model(arguments: FineTuningArguments, runs: list[dict[str, Any]]) -> dict[str, Any]:
    if arguments.baseline == "random_forest":
        what = "descriptors of points" if isinstance(arguments, SegmentationArguments) else "shape histograms"
        name = f"random forest on {what}"
        return {"name": name, "initialization": "random_forest", "parameters": 0, "weights": None}
    scratch = "from_scratch" if arguments.head == "full" else "untrained"
    return {
        "name": arguments.model_name_or_path or arguments.preset,
        "initialization": scratch if arguments.from_scratch else "pretrained",
        "parameters": runs[0]["parameters"],
        "weights": None if arguments.from_scratch else runs[0]["initial_weights"],
        "reading": reading(runs[0]["identity"]["config"]),
        "final_weights": [run["final_weights"] for run in runs],
    }


def _settings_of_training(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What was set by the data, and what happened."""
    return {
        "adam_betas": list(_BETAS),
        "steps": runs[0]["steps"],
        "batch_size_used": runs[0]["batch_size"],
        "num_points_used": runs[0]["num_points"],
        "trained_parameters": runs[0]["trained_parameters"],
        "best_steps": [run["best"] and run["best"]["step"] for run in runs],
        "seconds_of_training": [run["seconds"] for run in runs],
    }


def _protocol(arguments: FineTuningArguments, run: dict[str, Any]) -> str:
    """What was done, in words."""
    what = {"full": "all weights", "linear": "linear head, encoder frozen", "mlp": "MLP head, encoder frozen"}
    if arguments.baseline == "random_forest":
        words = ["random forest of 500 trees on shape histograms, fixed beforehand"]
        if isinstance(arguments, SegmentationArguments):
            words = [
                f"random forest of {NUM_TREES} trees on hand-made descriptors of points, {POINTS_OF_A_SHAPE} of each "
                "training shape, fixed beforehand",
                f"{run['num_points']:,} points",
            ]
    else:
        augmentation = arguments.augmentation
        if augmentation == "scale_translate":
            augmentation += f", scales {arguments.scale_min:.3g} to {arguments.scale_max:.3g}"
        scale = arguments.encoder_lr_scale
        slower = f" ({scale * arguments.learning_rate:g} for the encoder)" if scale != 1 else ""
        words = [
            f"fine-tuned ({what[arguments.head]})",
            f"{run['steps']:,} steps of {run['batch_size']} shapes ({augmentation})",
            f"AdamW, learning rate {arguments.learning_rate:g}{slower}, weight decay {arguments.weight_decay:g}",
            f"{run['num_points']:,} points",
            *([f"configuration with {arguments.config_overrides}"] if arguments.config_overrides else []),
            "last step reported",
        ]
    if getattr(arguments, "ways", 0):
        fold = f"{arguments.ways}-way {arguments.shots}-shot, {arguments.queries} test shapes a class, one fold a seed"
        words.insert(0, fold)
    if arguments.train_fraction < 1:
        words.append(f"{100 * arguments.train_fraction:g} % of the training labels, at least one of each class")
    if arguments.choose_on_test:
        words.append("BEST CHECKPOINT CHOSEN ON THE TEST SPLIT")
    return ", ".join(words)


def _build_accelerator(arguments: FineTuningArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
    )
    check_processes(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        share_cores(accelerator.num_processes, arguments.num_threads)
    return accelerator


def _check_output_dir(output_dir: Path, arguments: FineTuningArguments):
    present = output_dir.is_dir() and any(path.name != LOCK for path in output_dir.iterdir())
    if present and arguments.resume_from_checkpoint is None and not arguments.overwrite_output_dir:
        raise FileExistsError(
            f"`output_dir` {output_dir} is not empty. Choose another one, continue its run with "
            "--resume_from_checkpoint latest, or discard it with --overwrite_output_dir."
        )


def _remove_earlier_run(output_dir: Path):
    """Removes the results and the folders of seeds of an earlier run; other files stay."""
    (output_dir / RESULT).unlink(missing_ok=True)
    for folder in output_dir.glob("seed-*"):
        shutil.rmtree(folder)
