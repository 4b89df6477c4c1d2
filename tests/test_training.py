"""Pre-training: what a run repeats exactly, what it survives, and what it refuses.

Runs that are killed live in processes of their own; a fork server that has imported the package makes them cheap.
"""

import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from child_processes import ended, run_on_two
from huggingface_hub.errors import StrictDataclassClassValidationError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import HfArgumentParser

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining, JointMAEPointCloudProcessor
from jointmae_hf.data.augmentation import Augmentation
from jointmae_hf.data.collation import EpochBatches, PreTrainingCollator
from jointmae_hf.data.loading import load_point_clouds, load_point_dataset
from jointmae_hf.training import CheckpointError, NonFiniteLossError, PreTrainingArguments, checkpoints, pretrain
from jointmae_hf.training.arguments import build_config, parse_config_overrides
from jointmae_hf.training.averaging import WeightAverage
from jointmae_hf.training.flops import PEAKS, peak_flops, training_flops
from jointmae_hf.training.graphs import GraphedBackward
from jointmae_hf.training.optimization import build_optimizer, learning_rate_at, loss_gradient_norms, parameter_groups
from jointmae_hf.training.prefetch import prefetch
from jointmae_hf.training.pretraining import PreTrainer, available_cores, build_untrained_model
from jointmae_hf.training.summary import summarize


SCRIPT = Path(__file__).parents[1] / "examples" / "pretrain.py"

CONFIG = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,num_points=64,num_centers=[16,8],"
    "num_neighbors=[8,4],point_embed_sizes=[16,32],image_size=16,patch_strides=[2,2],image_embed_sizes=[16,32],"
    "decoder_hidden_size=16,decoder_num_attention_heads=2,decoder_intermediate_size=32,decoder_num_shared_layers=1,"
    "num_target_points=8"
)
# All that is random: what a resumed run could get wrong.
RANDOM_CONFIG = CONFIG + ",drop_path_rate=0.3,modality_dropout=0.3"
AGREEING_CONFIG = CONFIG + ",agreement_loss_weight=1"
# What differs between two runs of the same: how long they took.
TIMES = {"seconds", "samples_per_second"}


@pytest.fixture(autouse=True)
def one_thread_and_no_accelerator():
    """Sums depend on the number of threads, and Accelerate keeps its first settings for the life of a process."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """40 boxes and ellipsoids of unequal size, and eight more to test on."""
    generator = np.random.default_rng(0)
    clouds = []
    for _ in range(48):
        cloud = generator.normal(size=(int(generator.integers(60, 130)), 3))
        cloud /= np.linalg.norm(cloud, axis=1, keepdims=True)
        clouds.append((cloud * generator.uniform(0.3, 1, 3)).astype(np.float32))
    features = datasets.Features(
        {"points": datasets.Array2D((None, 3), "float32"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = datasets.Dataset.from_dict({"points": clouds, "label": [0, 1] * 24}, features=features)
    folder = tmp_path_factory.mktemp("data")
    rows.select(range(40)).to_parquet(folder / "train.parquet")
    rows.select(range(40, 48)).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture
def make(dataset, tmp_path):
    """Arguments of a short run; `make("name")` is a run in a folder of that name."""

    def make(name: str, **overrides) -> PreTrainingArguments:
        return PreTrainingArguments(
            **{
                "dataset": dataset,
                "output_dir": str(tmp_path / name),
                "config_overrides": CONFIG,
                "max_steps": 10,
                "batch_size": 8,
                "save_steps": 3,
                "logging_steps": 2,
                "grad_norm_steps": 4,
                "evaluate": False,
                "num_threads": 1,
                **overrides,
            }
        )

    return make


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def log(folder) -> list[dict]:
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def assert_same_run(folder, expected):
    """The same losses at the same steps, none twice, and the same weights, all bit for bit."""
    assert log(folder) == log(expected)
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def assert_close_run(folder, expected, atol=1e-5):
    """The same losses and weights but for rounding. Gradients of single losses are of a part of a batch: not those."""
    assert len(log(folder)) == len(log(expected))
    for found, wanted in zip(log(folder), log(expected), strict=True):
        for name in ("step", "loss", "loss_3d", "loss_2d", "loss_cross", "grad_norm", "lr"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), (found["step"], name)
    found = weights(folder)
    for name, wanted in weights(expected).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=atol)


# ---- Runs in other processes


def train_in_child(arguments: PreTrainingArguments, environment: dict[str, str] | None = None):
    os.environ.update(environment or {})
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as without a fork server
    torch.set_num_threads(1)
    pretrain(arguments)


def train_until_event(arguments: PreTrainingArguments, number: int):
    """Kills the process just before it touches the disk for the `number`-th time on behalf of a checkpoint."""
    events = 0

    def deadly(function):
        def wrapper(*args, **kwargs):
            nonlocal events
            events += 1
            if events == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    checkpoints.flush = deadly(checkpoints.flush)
    checkpoints.save_file = deadly(checkpoints.save_file)
    checkpoints.shutil.rmtree = deadly(checkpoints.shutil.rmtree)
    Path.rename = deadly(Path.rename)
    train_in_child(arguments)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process_lives(process), "the run ended too early"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def process_lives(process) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def test_the_script_killed_at_any_moment_and_resumed_repeats_the_uninterrupted_run(make):
    common = {"config_overrides": RANDOM_CONFIG, "max_steps": 80, "save_steps": 5, "num_threads": 1}
    straight, killed = make("straight", **common), make("killed", **common)
    options = [f"--{name}={getattr(killed, name)}" for name in ("dataset", "output_dir", *common)]
    options += ["--batch_size=8", "--logging_steps=2", "--grad_norm_steps=4", "--no_evaluate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    pretrain(straight)
    process = subprocess.Popen([sys.executable, str(SCRIPT), *options], env=environment, stderr=subprocess.DEVNULL)
    first = Path(killed.output_dir) / "checkpoint-5"
    wait_for(first.exists, process)
    time.sleep(random.random() * 0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (Path(killed.output_dir) / "result.json").exists()
    pretrain(make("killed", **common, resume_from_checkpoint="latest"))
    assert_same_run(killed.output_dir, straight.output_dir)


def test_a_run_killed_again_and_again_while_it_writes_checkpoints_repeats_the_uninterrupted_one(make, processes):
    common = {"config_overrides": RANDOM_CONFIG, "save_total_limit": 1, "save_steps": 2, "max_steps": 5}
    straight = make("straight", **common)
    pretrain(straight)
    killed = make("killed", **common, resume_from_checkpoint="latest")
    for number in range(1, 60, 3):
        process = processes.Process(target=train_until_event, args=(killed, number))
        process.start()
        code = ended(process)
        for path in checkpoints.list_checkpoints(Path(killed.output_dir)):
            checkpoints.verify_checkpoint(path)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert number > 15, "no run was killed while it removed a checkpoint"
    assert_same_run(killed.output_dir, straight.output_dir)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGINT, 1)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint_to_resume(make, processes, number, workers):
    common = {"config_overrides": RANDOM_CONFIG, "max_steps": 25, "save_steps": 0, "num_workers": workers}
    straight, stopped = make("straight", **common), make("stopped", **common)
    process = processes.Process(target=train_in_child, args=(stopped,))
    process.start()
    wait_for((Path(stopped.output_dir) / "log.jsonl").exists, process)
    os.killpg(process.pid, number)  # the whole group, as schedulers and terminals do
    assert ended(process) == 128 + number
    (checkpoint,) = checkpoints.list_checkpoints(Path(stopped.output_dir))
    assert 0 < checkpoints.checkpoint_step(checkpoint) < 25
    assert not (Path(stopped.output_dir) / "model.safetensors").exists()
    pretrain(straight)
    pretrain(make("stopped", **common, resume_from_checkpoint=str(checkpoint)))
    assert_same_run(stopped.output_dir, straight.output_dir)


def test_a_signal_to_all_processes_of_a_job_leaves_a_checkpoint(make, processes):
    stopped = make("stopped", max_steps=2000, save_steps=0, num_workers=1)
    process = processes.Process(target=train_in_child, args=(stopped,))
    process.start()
    wait_for((Path(stopped.output_dir) / "log.jsonl").exists, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not workers.exists():
        process.kill()
        pytest.skip("needs Linux, to find the workers")
    for pid in [*map(int, workers.read_text().split()), process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
    assert len(checkpoints.list_checkpoints(Path(stopped.output_dir))) == 1


def test_two_runs_do_not_share_a_folder(make):
    arguments = make("run", max_steps=1)
    folder = Path(arguments.output_dir)
    with checkpoints.folder_of_one_run(folder), pytest.raises(FileExistsError, match="is in use by another run"):
        pretrain(arguments)
    assert [path.name for path in folder.iterdir()] == [checkpoints.LOCK]
    pretrain(arguments)
    assert (folder / "model.safetensors").exists()


def test_the_folder_of_checkpoints_is_not_taken_for_one_of_them(make):
    pretrain(make("run", max_steps=3))
    with pytest.raises(ValueError, match="a folder of checkpoints, expected one of them or `latest`"):
        pretrain(make("other", resume_from_checkpoint=make("run").output_dir))


def test_weights_may_be_read_by_whoever_may_read_the_configuration(make):
    pretrain(make("run", max_steps=1, ema_decay=0.9))
    folder = Path(make("run").output_dir)
    for file in [*folder.rglob("*.safetensors")]:
        assert file.stat().st_mode == (folder / "config.json").stat().st_mode, file


def test_what_comes_after_the_checkpoint_that_is_resumed_from_is_put_aside(make):
    common = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9}
    pretrain(make("run", **common))
    folder = Path(make("run").output_dir)
    resumed = make("run", **common, resume_from_checkpoint=str(folder / "checkpoint-1"))
    PreTrainer(resumed)._prepare_output_dir()
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == ["checkpoint-1"]
    assert sorted(path.name[:20] for path in folder.glob("abandoned-*")) == ["abandoned-checkpoint"] * 3
    # They may be gone on from under their new names.
    again = make("run", **common, resume_from_checkpoint=str(folder / "abandoned-checkpoint-3"))
    assert pretrain(again)["steps"] == 4 and [record["step"] for record in log(folder)] == [1, 2, 4]


def train_sharded_in_child(arguments: PreTrainingArguments, environment: dict[str, str]):
    """Accelerate shards on accelerators only; here it is told to do the same on the CPU."""
    build = Accelerator.__init__

    def build_sharded(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for state in (self.state, PartialState()):  # the one is made anew from the other at times
            state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )

    Accelerator.__init__ = build_sharded
    train_in_child(arguments, environment)


def train_on_two(processes, arguments: PreTrainingArguments, train=train_in_child) -> dict:
    """Trains on two processes; returns the result."""
    run_on_two(processes, train, arguments)
    result = json.loads((Path(arguments.output_dir) / "result.json").read_text())
    assert result["num_processes"] == 2
    return result


SOURCES = {
    "table": {},
    "stream": {"streaming": True, "shuffle_buffer_size": 0},
    "mixture": {"train_data": "procedural:0.7,DATASET:0.3", "ema_decay": 0.9},
}


@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_train_as_one(make, processes, dataset, source):
    # A pass of 40 rows is five batches: beyond one pass of the stream too.
    common = {"max_grad_norm": 0.1, "max_steps": 7, **SOURCES[source]}
    if "train_data" in common:
        common["train_data"] = common["train_data"].replace("DATASET", dataset)
    one, two = make("one", **common), make("two", **common, gradient_accumulation_steps=2)
    pretrain(one)
    train_on_two(processes, two)
    assert_close_run(two.output_dir, one.output_dir)


def test_two_processes_that_each_hold_half_of_the_weights_train_as_one(make, processes):
    common = {"train_data": "procedural", "ema_decay": 0.9, "max_grad_norm": 0.1, "max_steps": 5, "grad_norm_steps": 0}
    one, two = make("one", **common), make("two", **common)
    pretrain(one)
    train_on_two(processes, two, train_sharded_in_child)
    assert_close_run(two.output_dir, one.output_dir)
    config = json.loads((Path(two.output_dir) / "config.json").read_text())
    assert config["architectures"] == ["JointMAEForPreTraining"]
    resumed = Path(make("resumed").output_dir)
    shutil.copytree(two.output_dir, resumed)
    again = make("resumed", **common, resume_from_checkpoint=str(resumed / "checkpoint-3"))
    train_on_two(processes, again, train_sharded_in_child)
    assert_same_run(resumed, two.output_dir)
    # Checkpoints are in one piece: one process goes on where two were.
    shutil.rmtree(resumed / "checkpoint-5")
    pretrain(make("resumed", **common, resume_from_checkpoint="latest"))
    assert_close_run(resumed, one.output_dir)


def test_two_processes_resume_a_shuffled_stream_at_the_exact_sample(make, processes):
    common = {"config_overrides": RANDOM_CONFIG, "streaming": True, "shuffle_buffer_size": 6, "max_steps": 8}
    straight, resumed = make("straight", **common, save_total_limit=None), Path(make("resumed").output_dir)
    train_on_two(processes, straight)
    shutil.copytree(straight.output_dir, resumed)
    (resumed / "result.json").unlink()
    train_on_two(processes, make("resumed", **common, resume_from_checkpoint=str(resumed / "checkpoint-3")))
    assert_same_run(resumed, straight.output_dir)


# ---- Exactness in one process


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_a_run_resumed_in_the_middle_of_an_epoch_and_of_a_line_of_the_log_is_exact(make, streaming):
    common = {"config_overrides": RANDOM_CONFIG, "streaming": streaming, "shuffle_buffer_size": 16}
    common["save_total_limit"] = None
    straight = make("straight", **common)
    pretrain(straight)
    for step in (3, 9):
        resumed = Path(make("resumed").output_dir)
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(straight.output_dir, resumed)
        shutil.rmtree(resumed / "checkpoint-10")
        result = pretrain(make("resumed", **common, resume_from_checkpoint=str(resumed / f"checkpoint-{step}")))
        assert_same_run(resumed, straight.output_dir)
        original = json.loads((Path(straight.output_dir) / "result.json").read_text())
        assert result["final_losses"] == original["final_losses"]


def test_a_checkpoint_can_be_continued_in_another_folder(make):
    straight = make("straight")
    pretrain(straight)
    pretrain(make("elsewhere", resume_from_checkpoint=str(Path(straight.output_dir) / "checkpoint-9")))
    assert_same_run(make("elsewhere").output_dir, straight.output_dir)


def test_workers_change_nothing(make):
    pretrain(make("none"))
    pretrain(make("some", num_workers=2))
    assert_same_run(make("some").output_dir, make("none").output_dir)


def test_accumulated_parts_train_as_the_whole_batch(make):
    pretrain(make("whole", max_grad_norm=0.1))
    pretrain(make("parts", max_grad_norm=0.1, gradient_accumulation_steps=4))
    assert_close_run(make("parts").output_dir, make("whole").output_dir)


@pytest.mark.parametrize(("agrees", "accumulation"), [(False, 1), (False, 2), (True, 1)])
def test_threads_share_a_batch_and_change_rounding_only(make, agrees, accumulation):
    common = {"max_grad_norm": 0.1, "grad_norm_steps": 0} | ({"config_overrides": AGREEING_CONFIG} if agrees else {})
    pretrain(make("alone", **common))
    shared = {**common, "num_threads": 2, "gradient_accumulation_steps": accumulation}
    assert PreTrainer(make("shared", **shared)).threads is not None
    pretrain(make("shared", **shared))
    # Agreement leaves biases before the standardisation a gradient of nothing but rounding, which Adam magnifies.
    assert_close_run(make("shared").output_dir, make("alone").output_dir, atol=1e-4 if agrees else 1e-5)
    pretrain(make("again", **shared))
    assert_same_run(make("again").output_dir, make("shared").output_dir)


@pytest.mark.parametrize("overrides", [{"config_overrides": RANDOM_CONFIG}, {"batch_size": 5}])
def test_threads_do_not_share_what_they_would_change(make, overrides):
    assert PreTrainer(make("run", num_threads=2, **overrides)).threads is None


def test_views_of_the_whole_batch_are_compared_and_resumed_exactly(make):
    common = {"config_overrides": AGREEING_CONFIG, "max_steps": 6}
    pretrain(make("whole", **common))
    first = log(make("whole").output_dir)[0]
    assert first["grad_norm_agreement"] > 0 and 0.1 < first["loss_agreement"] < 2 * math.log(8)
    pretrain(make("resumed", **common, resume_from_checkpoint=f"{make('whole').output_dir}/checkpoint-3"))
    assert_same_run(make("resumed").output_dir, make("whole").output_dir)
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 2"):
        pretrain(
            make(
                "parts",
                **common,
                resume_from_checkpoint=f"{make('whole').output_dir}/checkpoint-3",
                gradient_accumulation_steps=2,
            )
        )
    with pytest.raises(ValueError, match="`batch_size` is 4, one sample"):
        pretrain(make("single", **common, batch_size=4, gradient_accumulation_steps=4))


def test_measuring_gradients_does_not_disturb_training(make):
    pretrain(make("measured", grad_norm_steps=1))
    pretrain(make("plain", grad_norm_steps=0))
    found, wanted = weights(make("measured").output_dir), weights(make("plain").output_dir)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_mixture_with_averaged_weights_is_resumed_exactly(make, dataset):
    common = {"config_overrides": RANDOM_CONFIG, "train_data": f"procedural:0.7,{dataset}:0.3", "ema_decay": 0.8}
    straight = make("straight", **common, save_total_limit=None)
    result = pretrain(straight)
    assert result["dataset"][0]["share"] == 0.7 and result["dataset"][1]["clouds"] == 40
    assert result["weights"] == "averaged over the steps"
    resumed = Path(make("resumed").output_dir)
    shutil.copytree(straight.output_dir, resumed)
    pretrain(make("resumed", **common, num_workers=2, resume_from_checkpoint=str(resumed / "checkpoint-3")))
    assert_same_run(resumed, straight.output_dir)
    last = load_file(Path(straight.output_dir) / "checkpoint-10" / "average.safetensors")
    final = weights(straight.output_dir)
    assert last.keys() == final.keys() and all(torch.equal(last[name], final[name]) for name in last)
    raw = weights(Path(straight.output_dir) / "checkpoint-10")
    assert any(not torch.equal(raw[name], final[name]) for name in final)
    with pytest.raises(ValueError, match="`ema_decay` is None, .* was made with 0.8"):
        pretrain(make("resumed", **{**common, "ema_decay": None}, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="`train_data` is .*procedural .* was made with"):
        pretrain(make("resumed", **{**common, "train_data": "procedural"}, resume_from_checkpoint="latest"))


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("agrees", [False, True])
def test_batches_made_as_for_a_gpu_train_as_any_other(make, dataset, agrees):
    common = {"train_data": f"procedural:0.7,{dataset}:0.3", "max_steps": 5}
    common |= {"config_overrides": AGREEING_CONFIG} if agrees else {}
    pretrain(make("plain", **common))
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = PreTrainer(make("ahead", **common, num_workers=1))
    trainer.on_gpu = trainer.data.deferred = True
    trainer.run()
    # As with threads, rounding alone moves a few biases.
    assert_close_run(make("ahead").output_dir, make("plain").output_dir, atol=1e-4 if agrees else 1e-5)


def test_procedural_shapes_alone_need_no_data_set(make):
    result = pretrain(make("run", dataset=None, train_data="procedural", max_steps=2, evaluate=True))
    assert result["report"] is None and result["dataset"] == [{"share": 1.0, "version": 2, "seed": 0}]


def test_averaging_changes_the_final_weights_and_nothing_else(make):
    pretrain(make("plain"))
    pretrain(make("averaged", ema_decay=0.9))
    assert log(make("plain").output_dir) == log(make("averaged").output_dir)
    plain, averaged = (weights(make(name).output_dir) for name in ("plain", "averaged"))
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)


def test_a_compiled_run_in_bfloat16_trains_and_saves_as_any_other(make, monkeypatch):
    def compile_traced(module, **options):
        assert options == {"dynamic": False}
        compile_in_place(module, backend="eager", **options)  # the default takes minutes to do more than this

    common = {"mixed_precision": "bf16", "max_steps": 4, "grad_norm_steps": 0, "ema_decay": 0.9, "evaluate": True}
    plain = pretrain(make("plain", **common))
    AcceleratorState._reset_state(reset_partial_state=True)
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_traced)
    torch._dynamo.utils.counters.clear()
    compiled = pretrain(make("compiled", **common, compile=True))
    counters = torch._dynamo.utils.counters
    # Of training alone: the report is made without.
    assert 4 < counters["stats"]["unique_graphs"] < 16 and not counters["graph_break"]
    losses = [result["report"]["reconstruction"]["held_out"]["loss_3d"] for result in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    for found, wanted in zip(log(make("compiled").output_dir), log(make("plain").output_dir), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
    assert weights(make("compiled").output_dir).keys() == weights(make("plain").output_dir).keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_trains_as_kernel_by_kernel(make):
    overrides = CONFIG + ",agreement_loss_weight=1,agreement_of_visible=false"
    common = {"train_data": "procedural", "config_overrides": overrides, "mixed_precision": "bf16", "logging_steps": 1}
    pretrain(make("plain", **common))
    trainer = PreTrainer(make("graphed", **common, cuda_graph=True))
    graphed = trainer.graphed  # which the run lets go of at its end
    trainer.run()
    assert graphed.graph is not None and trainer.graphed is None
    for found, wanted in zip(log(make("graphed").output_dir), log(make("plain").output_dir), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_gives_the_gradients_of_each_batch_whatever_its_size():
    model = build_untrained_model(JointMAEConfig.from_preset("tiny", num_points=256), seed=0).cuda()
    graphed = GraphedBackward(model, model, ["loss_3d", "loss"])
    generator = torch.Generator("cuda").manual_seed(0)
    for size in (4, 4, 4, 4, 4, 3, 4):
        batch = {
            "point_values": torch.rand(size, 256, 3, generator=generator, device="cuda"),
            "view": torch.zeros(size, dtype=torch.int64, device="cuda"),
            "point_noise": torch.rand(size, 32, generator=generator, device="cuda"),
            "patch_noise": torch.rand(size, model.config.num_patches, generator=generator, device="cuda"),
        }
        values = graphed.backward(batch)
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        assert values.tolist() == pytest.approx([outputs.loss_3d.item(), outputs.loss.item()], rel=1e-4)
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)
        model.zero_grad()
        del outputs  # else its backward pass would still belong to the stream that is not captured
    assert graphed.graph is not None


def test_a_graph_needs_a_gpu(make, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="`cuda_graph` is True on cpu, expected a GPU"):
        pretrain(make("run", cuda_graph=True))


def test_another_seed_is_another_run(make):
    pretrain(make("zero", max_steps=2))
    pretrain(make("one", max_steps=2, seed=1))
    assert log(make("zero").output_dir)[0]["loss"] != log(make("one").output_dir)[0]["loss"]


def test_the_result_and_the_log_hold_what_happened(make):
    result = pretrain(make("run", epochs=2, max_steps=None))
    assert result == json.loads((Path(make("run").output_dir) / "result.json").read_text())
    assert result["steps"] == 10 and result["seconds"] > 0 and result["samples_per_second"] > 0
    assert result["arguments"]["batch_size"] == 8 and result["config"]["hidden_size"] == 32
    assert {"python", "torch", "transformers"} <= result["versions"].keys()
    assert result["flops_per_second"] == pytest.approx(result["samples_per_second"] * result["flops_per_sample"], 1e-2)
    assert result["share_of_peak"] is None and result["weights"] == "of the last step"
    lines = log(make("run").output_dir)
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10]
    assert [line["epoch"] for line in lines] == [0.2, 0.4, 0.8, 1.2, 1.6, 2.0]
    measured = [line["step"] for line in lines if "grad_norm_3d" in line]
    assert measured == [1, 4, 8]
    weights = {"3d": "point_loss_weight", "2d": "pixel_loss_weight", "cross": "cross_loss_weight"}
    for line in lines:
        total = sum(result["config"][weight] * line[f"loss_{term}"] for term, weight in weights.items())
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    # The last epoch is steps 6 to 10; a line holds the mean of its two steps.
    means = [line["loss"] for line in lines[-2:]]
    assert min(means) * 0.8 < result["final_losses"]["loss"] < max(means) * 1.2


def test_a_saved_run_is_a_model_to_load_and_holds_no_pickle(make):
    arguments = make("run")
    pretrain(arguments)
    files = [path for path in Path(arguments.output_dir).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".py", ""}
    assert [path.name for path in files if not path.suffix] == [checkpoints.LOCK]
    assert [path.name for path in checkpoints.list_checkpoints(Path(arguments.output_dir))] == [
        "checkpoint-9",
        "checkpoint-10",
    ]
    final = weights(arguments.output_dir)
    for folder in (arguments.output_dir, Path(arguments.output_dir) / "checkpoint-10"):
        state = JointMAEForPreTraining.from_pretrained(folder).state_dict()
        assert all(torch.equal(state[name], final[name]) for name in final)
        assert JointMAEPointCloudProcessor.from_pretrained(folder).num_points == 64


def test_training_can_start_from_the_weights_of_a_model(make):
    pretrain(make("first"))
    first = make("first").output_dir
    pretrain(make("second", model_name_or_path=first, config_overrides="pixel_loss_weight=0.5", learning_rate=1e-12))
    assert json.loads((Path(make("second").output_dir) / "config.json").read_text())["pixel_loss_weight"] == 0.5
    torch.testing.assert_close(weights(make("second").output_dir), weights(first))


def test_evaluation_gets_the_model_an_untrained_one_and_both_splits(make, monkeypatch):
    calls = []

    class Evaluation:
        @staticmethod
        def pretraining_report(model, untrained, train, test, output_dir, seed):
            calls.append((model, untrained, train, test, output_dir, seed))
            return {"accuracy": 0.5}

    monkeypatch.setitem(sys.modules, "jointmae_hf.evaluation", Evaluation)
    arguments = make("run", evaluate=True, max_steps=2, seed=3)
    assert pretrain(arguments)["report"] == {"accuracy": 0.5}
    ((model, untrained, train, test, output_dir, seed),) = calls
    assert train.points.shape == (40, 64, 3) and test.points.shape == (8, 64, 3)
    assert train.labels.tolist() == [0, 1] * 20 and test.class_names == ["a", "b"]
    assert output_dir == Path(arguments.output_dir) and seed == 3
    assert not model.training and not untrained.training
    start = build_untrained_model(build_config(arguments), 3).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in untrained.state_dict().items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())


def test_a_report_that_fails_leaves_the_result_of_the_training(make, monkeypatch):
    monkeypatch.setattr("jointmae_hf.evaluation.pretraining_report", lambda *_: 1 / 0)
    arguments = make("run", evaluate=True, max_steps=2)
    with pytest.raises(ZeroDivisionError):
        pretrain(arguments)
    result = json.loads((Path(arguments.output_dir) / "result.json").read_text())
    assert result["steps"] == 2 and result["report"] is None


def test_shapes_of_one_class_are_reported_without_a_classifier(make, dataset, tmp_path):
    folder = tmp_path / "shapes"
    for split in ("train", "test"):
        rows = datasets.load_dataset(dataset, split=split).filter(lambda row: row["label"] == 1)
        rows.to_parquet(folder / f"{split}.parquet")
    report = pretrain(make("run", dataset=str(folder), evaluate=True, max_steps=1))["report"]
    assert report["reconstruction"]["shapes"] == 4 and "linear_svm" not in report


def test_held_out_shapes_are_not_those_of_the_training(make, caplog):
    for splits in ({"split": "train+test"}, {"eval_split": "train[:20%]"}):
        with pytest.raises(ValueError, match="`eval_split` cannot .* share 8 of their 4. and 8 different clouds"):
            pretrain(make("run", evaluate=True, **splits))
    PreTrainer(make("run", evaluate=True, eval_split="train[:2]+test"))
    assert "share 2 of their 40 and 10 different clouds: these are not held out" in caplog.text


def test_weights_that_the_source_lacks_are_decided_by_the_seed(make, tmp_path):
    pretrain(make("source", max_steps=1))
    encoder = JointMAEForPreTraining.from_pretrained(make("source").output_dir).joint_mae
    encoder.save_pretrained(tmp_path / "encoder")
    common = {"model_name_or_path": str(tmp_path / "encoder"), "config_overrides": None}
    first, again, other = (PreTrainer(make(f"run{n}", **common, seed=n % 2)).raw_model for n in (0, 2, 1))
    decoders = [model.decoder.state_dict() for model in (first, again, other)]
    assert all(torch.equal(decoders[0][name], decoders[1][name]) for name in decoders[0])
    assert any(not torch.equal(decoders[0][name], decoders[2][name]) for name in decoders[0])


def test_the_model_and_its_result_are_uploaded_but_no_checkpoints(make, monkeypatch):
    uploads = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            uploads.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
            files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            uploads.append((repo_id, set(filter_repo_objects(files, ignore_patterns=ignore_patterns))))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    pretrain(make("run", max_steps=2, push_to_hub=True, hub_model_id="org/model", hub_private_repo=True))
    created, (repository, files) = uploads
    assert created == ("org/model", True, True) and repository == "org/model"
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "result.json", "log.jsonl"} <= files
    assert not any("checkpoint" in name or "optimizer" in name for name in files)


def test_without_the_2d_branch_training_goes_on_in_3d(make):
    pretrain(make("run", config_overrides=CONFIG + ",use_image_branch=false", max_steps=2))
    assert "loss_3d" in log(make("run").output_dir)[0] and "loss_2d" not in log(make("run").output_dir)[0]


# ---- Failures


@pytest.mark.parametrize("term", ["loss_3d", "loss_2d"])
def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(make, monkeypatch, term):
    method = {"loss_3d": "_point_loss", "loss_2d": "_patch_loss"}[term]
    original, calls = getattr(JointMAEForPreTraining, method), []

    def break_at_step_5(self, *args):
        calls.append(1)
        return original(self, *args) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(JointMAEForPreTraining, method, break_at_step_5)
    with pytest.raises(NonFiniteLossError, match=rf"{term} is nan at step 5.*checkpoint-3"):
        pretrain(make("run"))
    assert len(calls) == 5
    folder = Path(make("run").output_dir)
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == ["checkpoint-3"]
    checkpoints.verify_checkpoint(folder / "checkpoint-3")
    assert not (folder / "result.json").exists() and not (folder / "model.safetensors").exists()
    assert all(tensor.isfinite().all() for tensor in weights(folder / "checkpoint-3").values())


def test_a_gradient_that_is_not_finite_stops_training(make, monkeypatch):
    original = JointMAEForPreTraining._point_loss

    def infinite_slope(self, offsets, *args):
        return original(self, offsets, *args) + (offsets - offsets.detach()).abs().sqrt().sum()

    monkeypatch.setattr(JointMAEForPreTraining, "_point_loss", infinite_slope)
    with pytest.raises(NonFiniteLossError, match="gradient norm is .* at step 1.*no checkpoint yet"):
        pretrain(make("run"))


def flip_a_byte(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-7]), "has .* bytes, expected"),
    "flipped": (flip_a_byte, "is damaged"),
    "missing": (lambda file: file.unlink(), "is missing|cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(tmp_path, name, damage):
    model = torch.nn.Linear(2, 2)
    model.save_pretrained = lambda folder, state_dict: (folder / "model.safetensors").write_bytes(bytes(100))
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoints.save_checkpoint(tmp_path, 1, model, JointMAEPointCloudProcessor(), optimizer, {"step": 1})
    checkpoints.verify_checkpoint(path)
    breaks, message = DAMAGES[damage]
    breaks(path / name)
    with pytest.raises(CheckpointError, match=rf"{name} ({message})"):
        checkpoints.verify_checkpoint(path)


def test_latest_falls_back_to_the_checkpoint_before_a_damaged_one(make, caplog):
    straight = make("straight")
    pretrain(straight)
    pretrain(make("run"))
    folder = Path(make("run").output_dir)
    flip_a_byte(folder / "checkpoint-10" / "model.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint-10/model.safetensors is damaged"):
        pretrain(make("run", resume_from_checkpoint=str(folder / "checkpoint-10")))
    pretrain(make("run", resume_from_checkpoint="latest"))
    assert "checkpoint-10/model.safetensors is damaged" in caplog.text
    assert_same_run(folder, straight.output_dir)
    checkpoints.verify_checkpoint(folder / "checkpoint-10")  # written again
    for path in checkpoints.list_checkpoints(folder):
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="No checkpoint can be used"):
        pretrain(make("run", resume_from_checkpoint="latest"))


def test_resuming_with_other_decisive_arguments_is_refused_by_their_names(make, tmp_path, dataset):
    pretrain(make("run", max_steps=3))
    other = tmp_path / "other.parquet"
    load_point_dataset(dataset).select(range(30)).to_parquet(other)
    before = {path: path.read_bytes() for path in Path(make("run").output_dir).rglob("*") if path.is_file()}
    for name, value in {
        "seed": 1,
        "batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-4,
        "max_shift": 0.1,
        "max_jitter": 0.01,
        "dataset": str(other),
        "config_overrides": CONFIG + ",mask_ratio=0.5",
    }.items():
        expected = "config.mask_ratio" if name == "config_overrides" else name
        with pytest.raises(ValueError, match=f"`{expected}` is .* was made with"):
            pretrain(make("run", **{"max_steps": 3, name: value, "resume_from_checkpoint": "latest"}))
    assert before == {path: path.read_bytes() for path in before}


def test_an_output_folder_in_use_is_refused_unless_it_may_be_overwritten(make):
    folder = Path(make("run").output_dir)
    pretrain(make("run", max_steps=2))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite_output_dir"):
        pretrain(make("run", max_steps=1))
    pretrain(make("run", max_steps=1, overwrite_output_dir=True))
    assert [line["step"] for line in log(folder)] == [1]
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == ["checkpoint-1"]
    assert (folder / "notes.txt").read_text() == "mine"
    shutil.rmtree(folder / "checkpoint-1")
    with pytest.raises(FileExistsError):  # a finished run without checkpoints is no run to continue
        pretrain(make("run", resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"points_column": "xyz"}, r"`points_column` is 'xyz', but .* \['label', 'points'\]"),
        ({"points_column": "xyz", "streaming": True}, r"`points_column` is 'xyz', but .* \['label', 'points'\]"),
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, "`batch_size` is 9"),
        ({"batch_size": 64}, "`batch_size` is 64, but the data set has only 40 clouds"),
        ({"preset": "huge"}, "huge"),
        ({"report_to": "wandb"}, "`report_to` is 'wandb'"),
        ({"dataset": None}, "`dataset` is None"),
        ({"train_data": "procedural:0"}, "`train_data` gives 'procedural' the weight 0"),
        ({"split": "validation"}, "validation"),
        ({"scale_min": 2.0}, "`scale` is"),
        ({"max_tilt": 200.0}, "`max_tilt` is 200.0"),
    ],
)
def test_unusable_arguments_are_refused_before_training(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        pretrain(make("run", **wrong))
    assert not Path(make("run").output_dir).exists()


def test_sources_of_a_mixture_are_opened_in_the_configuration_asked_for(make, dataset):
    with pytest.raises(ValueError, match="'large' not found"):
        pretrain(make("run", train_data=dataset, max_steps=1, dataset_config_name="large"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"warmup_ratio": 1.0},
        {"seed": -1},
        {"max_steps": None, "streaming": True},
        {"max_steps": None, "train_data": "procedural"},
        {"streaming": True, "max_steps": 5, "train_data": "procedural"},
        {"eval_split": "train", "evaluate": True},
        {"ema_decay": 1.0},
        {"push_to_hub": True},
        {"config_name": "a", "model_name_or_path": "b"},
    ],
)
def test_contradictory_arguments_are_refused(make, wrong):
    name = {"push_to_hub": "hub_model_id"}.get(next(iter(wrong)), next(iter(wrong)))
    with pytest.raises(ValueError, match=f"`{name}` is"):
        make("run", **wrong)


# ---- Parts


def test_one_batch_can_be_overfitted(make, dataset):
    config = build_config(make("run"))
    clouds = load_point_clouds(load_point_dataset(dataset))
    batch, _ = EpochBatches(clouds, PreTrainingCollator(config, Augmentation(), 0), 2)[0]
    model = build_untrained_model(config, 0)
    optimizer = build_optimizer(model, 1e-2, 0.05, (0.9, 0.95))
    losses = []
    for _ in range(80):
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((outputs.loss_3d.item(), outputs.loss_2d.item()))
    assert losses[-1][0] < 0.2 * losses[0][0] and losses[-1][1] < 0.05 * losses[0][1]


@pytest.mark.parametrize("depth", [0, 2])
def test_batches_are_made_ahead_in_their_order_and_no_further(depth):
    made = []

    def batches():
        for number in range(6):
            made.append(number)
            yield {"x": torch.tensor([number])}, number

    ahead = prefetch(batches(), torch.device("cpu"), depth)
    seen = [next(ahead) for _ in range(2)]
    assert [(int(batch["x"]), rest) for batch, rest in seen] == [(0, 0), (1, 1)]
    deadline = time.monotonic() + 5
    while depth and len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == (5 if depth else 2)  # two taken, two ready, one in hand
    ahead.close()
    assert len(made) < 6 and "prefetch" not in [thread.name for thread in threading.enumerate()]
    assert [rest for _, rest in prefetch(batches(), torch.device("cpu"), depth)] == list(range(6))


@pytest.mark.parametrize("depth", [0, 2])
def test_what_goes_wrong_ahead_is_raised_where_the_batch_is_missing(depth):
    def batches():
        yield {"x": torch.ones(1)}, None
        raise KeyError("row 7")

    ahead = prefetch(batches(), torch.device("cpu"), depth)
    next(ahead)
    with pytest.raises(KeyError, match="row 7"):
        next(ahead)


def test_an_average_forgets_its_start_soon_and_then_follows_slowly():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    average = WeightAverage(model, 0.9)
    model.weight.data.fill_(1.0)
    average.update(1)
    assert average.tensors()["weight"].item() == pytest.approx(9 / 11)
    average.update(1000)
    assert average.tensors()["weight"].item() == pytest.approx(1 - 0.9 * 2 / 11)
    average.copy_to_model()
    assert model.weight.item() == pytest.approx(1 - 0.9 * 2 / 11)


def test_the_work_of_a_step_is_that_of_its_products():
    """A wider feed-forward layer adds two products of its width to each block, and two backward for each."""
    config = JointMAEConfig.from_preset("tiny")
    wide = JointMAEConfig(**{**config.to_dict(), "intermediate_size": 2 * config.intermediate_size})
    visible = config.num_visible_tokens + config.num_visible_patches
    added = 2 * visible * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    assert training_flops(wide) - training_flops(config) == pytest.approx(2 * 3 * added)


def test_a_peak_is_given_where_a_data_sheet_tells_it(monkeypatch):
    assert peak_flops(torch.device("cpu"), "bf16") is None
    for name, peak in (("NVIDIA H100 80GB HBM3", PEAKS["H100"]), ("NVIDIA H100 PCIe", 756e12), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), "bf16") == peak
        assert peak_flops(torch.device("cuda"), "no") is None


def test_a_summary_holds_the_speed_and_what_the_report_compares():
    svm = {"classes": 37, "pretrained": {"accuracy": 61.25}, "untrained": {"accuracy": 53.5}}
    losses = {"held_out": {"loss_3d": 0.005}, "encoder_output_averaged": {"loss_3d": 0.01}}
    result = {"steps": 100, "arguments": {"batch_size": 512}, "seconds": 60.0, "num_processes": 2, "device": "H100"}
    result |= {"samples_per_second": 853.3, "flops_per_second": 11.25e12, "share_of_peak": 0.0057, "report": None}
    speed = "51,200 samples in 1.0 minutes on 2 x H100: 853 samples/s, 11.2 TFLOP/s, 0.6% of the peak."
    assert summarize(result) == speed
    text = summarize({**result, "share_of_peak": None, "report": {"linear_svm": svm, "reconstruction": losses}})
    assert "of the peak" not in text and "2D loss" not in text
    assert "| 3D loss, 1e-3 | 5.00 | 10.00 |" in text and "| linear SVM, 37 classes, % | 61.25 | 53.50 |" in text


def test_only_matrices_are_decayed(make):
    model = build_untrained_model(build_config(make("run")), 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(names)
    decayed, spared = (
        {names[id(parameter)] for group in groups if group["weight_decay"] == decay for parameter in group["params"]}
        for decay in (0.05, 0.0)
    )
    assert {"decoder.mask_tokens", "decoder.modality_embeddings", "joint_mae.modality_embeddings"} <= spared
    assert "joint_mae.layernorm.weight" in spared
    assert {name for name in names.values() if name.endswith("bias")} <= spared
    assert {"joint_mae.layers.0.mlp.fc1.weight", "decoder.point_head.weight"} <= decayed
    assert not any("norm" in name for name in decayed)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [learning_rate_at(step, 100, 10, 2.0) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) == max(rates)
    assert rates[10] == pytest.approx(2.0) and rates[55] == pytest.approx(1.0) and 0 < rates[-1] < 1e-3
    assert all(earlier >= later for earlier, later in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate_at(1, 1, 0, 2.0) == 2.0


def test_gradient_norms_are_those_of_the_weighted_losses_and_leave_no_trace():
    shared, other = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.ones(2))
    losses = {"a": 3 * shared.square().sum(), "b": (shared * other).sum(), "c": other.sum()}
    norms = loss_gradient_norms(losses, [shared], scale=8.0)
    assert norms == pytest.approx({"a": 6 * 5**0.5, "b": 2**0.5, "c": 0.0})
    assert shared.grad is None and other.grad is None
    sum(losses.values()).backward()  # the graph is still there
    torch.testing.assert_close(shared.grad, torch.tensor([7.0, 13.0]))


def test_overrides_are_parsed_with_their_types():
    parsed = parse_config_overrides(
        "num_centers=[64, 16],mask_ratio=0.6,use_cross_loss=false,position_every_layer=True,"
        "alignment_radii=[1,null],hidden_act=relu"
    )
    assert parsed == {
        "num_centers": [64, 16],
        "mask_ratio": 0.6,
        "use_cross_loss": False,
        "position_every_layer": True,
        "alignment_radii": [1, None],
        "hidden_act": "relu",
    }
    with pytest.raises(ValueError, match="'mask_ration'"):
        parse_config_overrides("mask_ration=0.5")
    with pytest.raises(ValueError, match="expected key=value"):
        parse_config_overrides("mask_ratio")


def test_a_configuration_comes_from_a_preset_or_a_file_with_overrides(make, tmp_path):
    JointMAEConfig.from_preset("small", mask_ratio=0.5).save_pretrained(tmp_path / "config")
    config = build_config(make("run", config_name=str(tmp_path / "config"), config_overrides="drop_path_rate=0.2"))
    assert (config.hidden_size, config.mask_ratio, config.drop_path_rate) == (256, 0.5, 0.2)
    assert build_config(make("run", preset="base", config_overrides=None)).hidden_size == 384
    with pytest.raises(StrictDataclassClassValidationError, match="mask_ratio"):
        build_config(make("run", config_overrides="mask_ratio=1.5"))


def test_the_script_does_nothing_when_imported_and_finds_its_data():
    spec = importlib.util.spec_from_file_location("pretrain_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.EMBEDDED_DATASET.resolve() == SCRIPT.parent / "data" / "kicad-parts"
    assert module.name_embedded_dataset("procedural:3,kicad") == f"procedural:3.0,{module.EMBEDDED_DATASET}:1.0"


@pytest.mark.parametrize(
    ("device", "preset", "precision"),
    [("gpu", "base", "bf16"), ("gpus", "base", "bf16"), ("cpu-bf16", "tiny", "bf16"), ("cpu", "tiny", None)],
)
def test_the_speedrun_is_a_recipe_of_the_script_for_the_device_that_there_is(tmp_path, device, preset, precision):
    (tmp_path / "bin").mkdir()
    output = tmp_path / "somewhere"
    output.mkdir()
    tells = f'if [ "$1" = -c ]; then echo {device}; else echo "$@" >> "{tmp_path}/called"; fi'
    for name, line in (("python", tells), ("accelerate", "printf '%s\\n' \"$@\"")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".train").touch()  # as if everything was installed
    environment = {**os.environ, "VENV": str(tmp_path), "OUTPUT": str(output)}
    command = ["bash", str(SCRIPT.with_name("speedrun.sh")), "--max_steps", "7"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    *options, table = printed.split("examples/pretrain.py\n")[1].splitlines()
    assert table == (output / "table.md").read_text().strip()
    downstream, tables = (tmp_path / "called").read_text().splitlines()
    assert downstream.startswith(f"benchmarks/downstream.py {output} ") and str(output / "downstream") in tables
    (arguments,) = HfArgumentParser(PreTrainingArguments).parse_args_into_dataclasses(options)
    assert (arguments.preset, arguments.max_steps, arguments.output_dir) == (preset, 7, str(output))
    assert arguments.mixed_precision == precision and arguments.compile == device.startswith("gpu")
    assert arguments.cuda_graph == (device == "gpu")
    assert arguments.train_data == "procedural" and arguments.evaluate
    config = build_config(arguments)
    assert config.agreement_loss_weight > 0 and config.pooling_layers[-1] == config.num_hidden_layers


def test_a_data_set_without_a_held_out_split_is_told_how_to_go_on(make, dataset):
    with pytest.raises(ValueError, match="`split` is 'test', but .* has the splits \\['train'\\].*--no_evaluate"):
        pretrain(make("run", dataset=f"{dataset}/train.parquet", evaluate=True))


def test_a_run_on_the_cpu_has_the_threads_it_was_told(make):
    before = torch.get_num_threads()
    try:
        pretrain(make("one", max_steps=1, num_threads=1))
        assert torch.get_num_threads() == 1
        pretrain(make("all", max_steps=1, num_threads=None))
        assert torch.get_num_threads() == available_cores()
    finally:
        torch.set_num_threads(before)
