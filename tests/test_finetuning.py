"""Fine-tuning: both heads learn, runs repeat and resume exactly, and what is reported is what the models give."""

import json
import logging
import os
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from child_processes import run_on_two
from safetensors.torch import load_file

from jointmae_hf import (
    JointMAEConfig,
    JointMAEForPartSegmentation,
    JointMAEForPointCloudClassification,
    JointMAEForPreTraining,
    JointMAEPointCloudProcessor,
)
from jointmae_hf.data.labelled import load_labelled_splits, stratified_rows, validation_rows
from jointmae_hf.data.loading import fixed_subsample
from jointmae_hf.evaluation import draw_fold, read_result, read_results
from jointmae_hf.evaluation.classification import predict_logits
from jointmae_hf.training import finetuning
from jointmae_hf.training.finetuning import finetune_classification, finetune_segmentation
from jointmae_hf.training.finetuning_arguments import ClassificationArguments, SegmentationArguments
from jointmae_hf.training.pretraining import config_fields


CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_points": 64,
    "num_centers": [16, 8],
    "num_neighbors": [8, 4],
    "point_embed_sizes": [16, 32],
    "image_size": 16,
    "patch_strides": [2, 2],
    "image_embed_sizes": [16, 32],
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "num_target_points": 8,
    "classifier_hidden_size": 32,
    "drop_path_rate": 0.2,
}


@pytest.fixture(autouse=True)
def one_thread_and_no_accelerator():
    """Sums depend on the number of threads, and Accelerate keeps its first settings for the life of a process."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_dataset(folder: Path, sizes=(60, 30), num_points=(60, 130)) -> str:
    """Rods, discs and balls of unequal size; the half towards x is another part than the other."""
    generator = np.random.default_rng(0)
    features = datasets.Features(
        {
            "points": datasets.Array2D((None, 3), "float32"),
            "label": datasets.ClassLabel(names=["rod", "disc", "ball"]),
            "part_labels": datasets.List(datasets.ClassLabel(names=["left", "right"])),
        }
    )
    folder.mkdir(parents=True)
    for split, size in zip(("train", "test"), sizes, strict=True):
        labels, clouds = np.arange(size) % 3, []
        for label in labels:
            cloud = generator.normal(size=(int(generator.integers(*num_points)), 3))
            clouds.append((cloud * [[1, 0.1, 0.1], [1, 1, 0.1], [1, 1, 1]][label]).astype(np.float32))
        parts = [(cloud[:, 0] > 0).astype(int).tolist() for cloud in clouds]
        rows = {"points": clouds, "label": labels.tolist(), "part_labels": parts}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(3)
    JointMAEForPreTraining(JointMAEConfig(**CONFIG)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(dataset, pretrained, tmp_path):
    """Arguments of a short run; `make("name")` is a run in a folder of that name."""

    def make(name: str, kind=ClassificationArguments, **overrides):
        return kind(
            **{
                "dataset": dataset,
                "model_name_or_path": pretrained,
                "output_dir": str(tmp_path / name),
                "num_points": 64,
                "batch_size": 16,
                "max_steps": 9,
                "eval_epochs": 2,
                "save_steps": 4,
                "logging_steps": 2,
                "num_threads": 1,
                **overrides,
            }
        )

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    found, wanted = weights(first), weights(second)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def log(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# ---- What is learned and reported


def test_a_classifier_learns_and_its_last_model_is_the_one_reported(make, dataset, tmp_path):
    result = finetune_classification(make("run", max_steps=100, learning_rate=5e-3, eval_epochs=10, voting=3))
    assert result.metrics["accuracy"]["mean"] >= 80
    assert {"accuracy_voted", "mean_class_accuracy", "accuracy_best_on_validation"} <= result.metrics.keys()
    assert read_result(tmp_path / "run" / "result.json") == result
    assert result.split_sizes == {"train": 54, "validation": 6, "test": 30, "classes": 3}

    _, test = load_labelled_splits(dataset, ("train", "test"))
    points = fixed_subsample(test.clouds, 64, 0)
    for folder, metric in (("seed-0", "accuracy"), ("seed-0/best", "accuracy_best_on_validation")):
        model = JointMAEForPointCloudClassification.from_pretrained(tmp_path / "run" / folder)
        right = predict_logits(model, points).argmax(1) == test.labels
        assert 100 * right.mean() == pytest.approx(result.metrics[metric]["mean"])
        assert model.config.id2label == {0: "rod", 1: "disc", 2: "ball"}
        assert JointMAEPointCloudProcessor.from_pretrained(tmp_path / "run" / folder).num_points == 64


def test_segmentation_learns_parts_of_clouds_of_any_size(make, tmp_path):
    arguments = make("run", SegmentationArguments, max_steps=60, learning_rate=5e-3, num_points=100, eval_epochs=20)
    result = finetune_segmentation(arguments)
    assert result.metrics["point_accuracy"]["mean"] >= 80
    assert result.metrics["instance_miou"]["mean"] >= 60
    assert {"class_miou", "instance_miou_best_on_validation"} <= result.metrics.keys()
    model = JointMAEForPartSegmentation.from_pretrained(tmp_path / "run" / "seed-0")
    assert model.config.object_classes == ["rod", "disc", "ball"] and model.config.num_object_classes == 3
    assert "object_classes" not in config_fields(model.config)  # a run may be resumed that knew no names
    assert model.config.id2label == {0: "left", 1: "right"}


@pytest.mark.parametrize("head, layers", [("linear", 1), ("mlp", 3)])
def test_a_frozen_encoder_keeps_its_weights_while_the_head_learns(make, pretrained, tmp_path, head, layers):
    finetune_classification(make("run", head=head, validation_fraction=0.0))
    before, after = weights(Path(pretrained)), weights(tmp_path / "run" / "seed-0")
    encoder = [name for name in after if name.startswith("joint_mae.")]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    model = JointMAEForPointCloudClassification.from_pretrained(tmp_path / "run" / "seed-0")
    assert model.config.classifier_num_layers == layers
    assert not (tmp_path / "run" / "seed-0" / "best").exists()  # nothing to judge by


def test_of_a_model_with_a_head_only_the_encoder_is_taken_on(make, pretrained, tmp_path):
    finetune_classification(make("linear", head="linear", validation_fraction=0.0))
    source = tmp_path / "linear" / "seed-0"
    options = {"model_name_or_path": str(source), "learning_rate": 1e-12, "validation_fraction": 0.0}
    result = finetune_classification(make("again", head="linear", **options))
    learned, fresh = weights(source), weights(tmp_path / "again" / "seed-0")
    encoder = [name for name in learned if name.startswith("joint_mae.")]
    assert encoder and all(torch.equal(learned[name], fresh[name]) for name in encoder)
    assert not torch.allclose(learned["classifier.out_proj.weight"], fresh["classifier.out_proj.weight"], atol=1e-3)
    assert result.model["initialization"] == "pretrained"
    finetune_classification(make("mlp", head="mlp", **options))
    model = JointMAEForPointCloudClassification.from_pretrained(tmp_path / "mlp" / "seed-0")
    assert model.config.classifier_num_layers == 3


def test_the_encoder_can_learn_slower_than_the_head(make, pretrained, tmp_path):
    moved = {}
    options = {"max_steps": 2, "validation_fraction": 0.0, "config_overrides": "classifier_dropout=0.2"}
    for name, scale in (("fast", 1.0), ("slow", 1e-3)):
        result = finetune_classification(make(name, encoder_lr_scale=scale, **options))
        before, after = weights(Path(pretrained)), weights(tmp_path / name / "seed-0")
        layer = "joint_mae.layers.0.mlp.fc1.weight"
        moved[name] = (after[layer] - before[layer]).abs().max().item()
    assert 0 < moved["slow"] < 0.01 * moved["fast"]
    assert "learning rate 0.0005 (5e-07 for the encoder)" in result.protocol
    assert "configuration with classifier_dropout=0.2" in result.protocol


def test_every_seed_is_a_run_of_its_own_in_one_result(make, tmp_path):
    result = finetune_classification(make("both", seeds=[0, 1]))
    alone = finetune_classification(make("alone", seeds=[1]))
    assert result.seeds == [0, 1] and result.metrics["accuracy"]["values"][1] == alone.metrics["accuracy"]["mean"]
    assert same(tmp_path / "both" / "seed-1", tmp_path / "alone" / "seed-1")
    assert not same(tmp_path / "both" / "seed-0", tmp_path / "both" / "seed-1")
    assert len(read_results([tmp_path / "both"])) == 1


def test_from_scratch_starts_from_other_weights_and_says_so(make, pretrained):
    scratch = finetune_classification(make("scratch", from_scratch=True, max_steps=1))
    tuned = finetune_classification(make("tuned", max_steps=1))
    assert (scratch.model["initialization"], tuned.model["initialization"]) == ("from_scratch", "pretrained")
    assert scratch.model["weights"] is None and scratch.model["parameters"] == tuned.model["parameters"]


@pytest.mark.parametrize(
    "kind, finetune",
    [(ClassificationArguments, finetune_classification), (SegmentationArguments, finetune_segmentation)],
)
def test_a_head_on_random_weights_is_called_untrained(make, tmp_path, kind, finetune):
    result = finetune(make("run", kind, from_scratch=True, head="mlp", max_steps=2, validation_fraction=0.0))
    assert result.model["initialization"] == "untrained" and "encoder frozen" in result.protocol
    torch.manual_seed(0)
    is_classifier = kind is ClassificationArguments
    model_class = JointMAEForPointCloudClassification if is_classifier else JointMAEForPartSegmentation
    expected = model_class(JointMAEConfig.from_pretrained(tmp_path / "run" / "seed-0"))
    found = weights(tmp_path / "run" / "seed-0")
    frozen = {name: tensor for name, tensor in expected.state_dict().items() if name.startswith("joint_mae.")}
    assert frozen and all(torch.equal(found[name], tensor) for name, tensor in frozen.items())


def test_a_random_forest_gets_the_shapes_that_a_network_would(make, tmp_path):
    options = {"train_fraction": 0.5, "seeds": [0, 1]}
    result = finetune_classification(make("forest", baseline="random_forest", model_name_or_path=None, **options))
    tuned = finetune_classification(make("tuned", max_steps=1, **options))
    assert result.split_sizes == tuned.split_sizes and result.task == tuned.task == "classification"
    most = finetune_classification(
        make("most", baseline="random_forest", model_name_or_path=None, num_points=500, **options)
    )
    assert 64 < most.settings["num_points_used"] < 130
    assert result.model["initialization"] == "random_forest" and result.metrics["accuracy"]["mean"] > 80
    assert read_result(tmp_path / "forest" / "result.json") == result


def test_a_random_forest_segments_the_shapes_that_a_network_would(make, tmp_path):
    options = {"kind": SegmentationArguments, "train_fraction": 0.5, "seeds": [0, 1]}
    result = finetune_segmentation(make("forest", baseline="random_forest", model_name_or_path=None, **options))
    tuned = finetune_segmentation(make("tuned", max_steps=1, **options))
    assert result.split_sizes == tuned.split_sizes and result.metrics.keys() <= tuned.metrics.keys()
    assert result.settings["num_points_used"] == tuned.settings["num_points_used"]
    assert result.model["name"] == "random forest on descriptors of points"
    assert result.metrics["point_accuracy"]["mean"] > 90  # a half-space: coordinates tell it
    assert read_result(tmp_path / "forest" / "result.json") == result
    unknown = make("unknown", baseline="random_forest", use_object_class=False, kind=SegmentationArguments)
    assert finetune_segmentation(unknown).metrics["point_accuracy"]["mean"] > 90


def test_the_test_split_chooses_only_when_told_to_and_the_result_says_so(make, monkeypatch):
    seen = []
    original = finetuning.ClassificationTuner.measure

    def measure(tuner, data):
        seen.append(data is tuner.test)
        return original(tuner, data)

    monkeypatch.setattr(finetuning.ClassificationTuner, "measure", measure)
    result = finetune_classification(make("honest"))
    assert not any(seen[:-2]) and all(seen[-2:])  # the last model, then the best one, after the last step
    assert not result.chosen_on_test and "accuracy_chosen_on_test" not in result.metrics
    result = finetune_classification(make("chosen", choose_on_test=True))
    assert result.chosen_on_test and "CHOSEN ON THE TEST SPLIT" in result.protocol
    assert "accuracy_chosen_on_test" in result.metrics and "accuracy_best_on_validation" not in result.metrics


# ---- What repeats


@pytest.mark.parametrize(
    "kind, finetune",
    [(ClassificationArguments, finetune_classification), (SegmentationArguments, finetune_segmentation)],
)
@pytest.mark.parametrize("killed_after", [5, 8])
def test_a_killed_run_resumes_to_the_same_weights(make, monkeypatch, tmp_path, kind, finetune, killed_after):
    whole = finetune(make("whole", kind))
    original = finetuning.FineTuner._training_step

    def die(tuner, step, batches):
        if step > killed_after:
            raise KeyboardInterrupt
        return original(tuner, step, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning.FineTuner, "_training_step", die)
        finetune(make("killed", kind))
    resumed = finetune(make("killed", kind, resume_from_checkpoint="latest"))
    assert resumed.metrics == whole.metrics
    for folder in ("seed-0", "seed-0/best"):
        assert same(tmp_path / "whole" / folder, tmp_path / "killed" / folder)
    assert not list((tmp_path / "killed" / "seed-0").glob("best-*"))
    assert log(tmp_path / "whole" / "seed-0") == log(tmp_path / "killed" / "seed-0")


def test_the_best_model_is_that_of_the_checkpoint_that_a_run_goes_on_from(make, monkeypatch, tmp_path):
    values = iter([50.0, 90.0, 40.0, 40.0, 40.0, 40.0])
    monkeypatch.setattr(finetuning.ClassificationTuner, "measure", lambda *_: {"accuracy": next(values)})
    original = finetuning.FineTuner._save

    def die(tuner):
        if tuner.step == 2:
            raise KeyboardInterrupt
        return original(tuner)

    options = {"max_steps": 3, "eval_epochs": 0.1, "save_steps": 1, "save_total_limit": None}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning.FineTuner, "_save", die)
        finetune_classification(make("run", **options))
    folder = tmp_path / "run" / "seed-0"
    assert {path.name for path in folder.glob("best-*")} == {"best-1", "best-2"}
    result = finetune_classification(make("run", resume_from_checkpoint="latest", **options))
    assert result.settings["best_steps"] == [1] and same(folder / "best", folder / "checkpoint-1")
    assert not list(folder.glob("best-*"))


def test_a_frozen_encoder_resumes_too(make, tmp_path):
    finetune_classification(make("whole", head="mlp"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    seed = tmp_path / "killed" / "seed-0"
    shutil.rmtree(seed / "checkpoint-9")
    (seed / "metrics.json").unlink()
    finetune_classification(make("killed", head="mlp", resume_from_checkpoint="latest"))
    assert same(tmp_path / "whole" / "seed-0", tmp_path / "killed" / "seed-0")


def finetune_in_child(arguments: list[ClassificationArguments], environment: dict[str, str]):
    os.environ.update(environment)
    os.setpgrp()
    torch.set_num_threads(1)
    for each in arguments:
        result = finetune_classification(each)
        assert (result is None) == (environment["RANK"] != "0")


def test_two_processes_share_a_batch_and_resume(make, processes, tmp_path):
    run_on_two(processes, finetune_in_child, [make("whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    seed = tmp_path / "stopped" / "seed-0"
    (tmp_path / "stopped" / "result.json").unlink()
    (seed / "metrics.json").unlink()
    shutil.rmtree(seed / "checkpoint-9")
    run_on_two(processes, finetune_in_child, [make("stopped", resume_from_checkpoint="latest")])
    whole, resumed = (read_result(tmp_path / name / "result.json") for name in ("whole", "stopped"))
    assert whole.metrics == resumed.metrics and whole.settings["num_processes"] == 2
    assert same(tmp_path / "whole" / "seed-0", seed)


def test_processes_that_do_not_join_are_refused(make, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does where Accelerate finds no GPU
    with pytest.raises(ValueError, match="2 processes were launched, but 1 work together"):
        finetune_classification(make("run"))
    assert not (tmp_path / "run").exists()


def test_seeds_that_are_done_are_not_repeated(make, monkeypatch, tmp_path):
    finetune_classification(make("run", seeds=[0]))
    steps = []
    original = finetuning.FineTuner._training_step
    monkeypatch.setattr(
        finetuning.FineTuner,
        "_training_step",
        lambda tuner, step, batches: (steps.append(tuner.seed), original(tuner, step, batches))[1],
    )
    result = finetune_classification(make("run", seeds=[0, 1], resume_from_checkpoint="latest"))
    assert set(steps) == {1} and result.seeds == [0, 1]
    # More votes need no training, only another look at the test split.
    steps.clear()
    result = finetune_classification(make("run", seeds=[0, 1], voting=2, resume_from_checkpoint="latest"))
    assert not steps and "accuracy_voted" in result.metrics


def test_a_result_of_resumed_seeds_says_who_made_each(make, monkeypatch, tmp_path):
    options = {"max_steps": 2, "validation_fraction": 0.0}
    for commit, seeds in (("first", [0]), ("second", [0, 1])):
        made_by = {"git_commit": commit, "versions": {}, "device": "a CPU"}
        monkeypatch.setattr(finetuning, "origin", lambda device, made_by=made_by: made_by)
        result = finetune_classification(make("run", seeds=seeds, resume_from_checkpoint="latest", **options))
    records = [json.loads((tmp_path / "run" / f"seed-{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
    assert [[each["git_commit"] for each in record["origins"]] for record in records] == [["first"], ["second"]]
    assert result.git_commit == "first; second"
    seconds = sum(record["seconds"] + record["seconds_of_evaluation"] for record in records)
    assert result.seconds == pytest.approx(seconds, abs=0.01) and all(record["seconds"] > 0 for record in records)
    # A seed that went on under another commit has both.
    (tmp_path / "run" / "seed-0" / "metrics.json").unlink()
    result = finetune_classification(make("run", seeds=[0], resume_from_checkpoint="latest", **options))
    assert result.git_commit == "first; second"
    assert result.settings["seconds_of_training"] == pytest.approx([records[0]["seconds"]], abs=0.2)


def test_a_run_is_not_continued_with_other_arguments_or_weights(make, dataset, pretrained, tmp_path):
    finetune_classification(make("run"))
    with pytest.raises(ValueError, match="`learning_rate` is 0.1, but .* was made with 0.0005"):
        finetune_classification(make("run", learning_rate=0.1, resume_from_checkpoint="latest"))
    other = JointMAEForPreTraining(JointMAEConfig(**CONFIG))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`initial_weights`"):
        finetune_classification(
            make("run", model_name_or_path=str(tmp_path / "other"), resume_from_checkpoint="latest")
        )
    with pytest.raises(FileExistsError, match="is not empty"):
        finetune_classification(make("run"))


@pytest.mark.parametrize(
    "tuner_class, kind, head",
    [
        (finetuning.ClassificationTuner, ClassificationArguments, {}),
        (finetuning.ClassificationTuner, ClassificationArguments, {"head": "mlp"}),
        (finetuning.SegmentationTuner, SegmentationArguments, {}),
    ],
)
def test_threads_that_share_a_batch_find_the_same_gradient(make, dataset, tuner_class, kind, head):
    options = {"config_overrides": "drop_path_rate=0.0", "batch_size": 15, "num_threads": 2, **head}  # unequal slices
    data = load_labelled_splits(dataset, ("train", "test"), part_column="part_labels")
    tuner = tuner_class(make("run", kind, **options), 0, data)
    tuner._train_mode()
    batch, _ = next(tuner._batches())
    losses, gradients = [], []
    for shared in (True, False):
        torch.manual_seed(0)
        if shared:
            loss = tuner.threads.backward(batch["point_values"], lambda outputs: tuner._head_loss(batch, outputs), 0.5)
        else:
            loss = tuner.raw_model(**batch).loss
            (0.5 * loss).backward()
        losses.append(loss.item())
        named = tuner.raw_model.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named if parameter.grad is not None})
        tuner.optimizer.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("joint_mae.") for name in gradients[0]) == (not head)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_threads", [3, 12])
def test_any_number_of_threads_may_share_a_batch(make, num_threads):
    overrides = {"config_overrides": "drop_path_rate=0", "num_threads": num_threads, "max_steps": 2}
    result = finetune_classification(make("run", batch_size=10, **overrides))
    assert result.settings["steps"] == 2


def test_weights_are_trained_in_float32_whatever_they_were_saved_in(make, pretrained, tmp_path):
    JointMAEForPreTraining.from_pretrained(pretrained).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    finetune_classification(make("run", model_name_or_path=str(tmp_path / "half"), max_steps=1))
    kinds = {tensor.dtype for tensor in weights(tmp_path / "run" / "seed-0").values()}
    assert torch.bfloat16 not in kinds and torch.float32 in kinds


def test_a_layer_that_nothing_is_read_from_does_not_hinder_resuming(make, monkeypatch, tmp_path):
    overrides = {"config_overrides": "pooling_layers=[1]", "max_steps": 2, "save_steps": 1, "save_total_limit": None}
    finetune_classification(make("straight", **overrides))
    shutil.copytree(
        tmp_path / "straight" / "seed-0" / "checkpoint-1", tmp_path / "resumed" / "seed-0" / "checkpoint-1"
    )
    finetune_classification(make("resumed", **overrides, resume_from_checkpoint="latest"))
    assert same(tmp_path / "resumed" / "seed-0", tmp_path / "straight" / "seed-0")


def test_more_points_than_clouds_have_are_no_more_points(make):
    result = finetune_classification(make("run", num_points=500, max_steps=1))
    assert 64 < result.settings["num_points_used"] < 130
    assert f"{result.settings['num_points_used']} points" in result.protocol


def test_an_encoder_that_draws_random_numbers_is_not_shared_by_threads(make, caplog):
    caplog.set_level(logging.INFO)
    finetune_classification(make("run", num_threads=2, max_steps=1, validation_fraction=0.0))
    assert "Threads work inside operators" in caplog.text


# ---- Few labels, and what is refused


def test_a_share_of_the_labels_takes_of_every_class_and_grows_with_the_share():
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    small, large = stratified_rows(labels, 0.05, 0), stratified_rows(labels, 0.5, 0)
    assert np.bincount(labels[small]).tolist() == [5, 1, 1] and np.bincount(labels[large]).tolist() == [50, 5, 1]
    assert set(small) <= set(large)
    assert set(small) != set(stratified_rows(labels, 0.05, 1))
    kept, held_out = validation_rows(labels, 0.1, 0)
    assert np.bincount(labels[held_out], minlength=3).tolist() == [10, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(len(labels)))


def test_few_shot_folds_are_those_of_the_frozen_task(make, dataset, tmp_path):
    fold = {"ways": 2, "shots": 5, "queries": 7, "validation_fraction": 0.0}
    result = finetune_classification(make("run", seeds=[0, 1], max_steps=2, **fold))
    assert result.task == "few_shot" and result.split_sizes == {"train": 10, "validation": 0, "test": 14, "classes": 2}
    assert "2-way 5-shot, 7 test shapes a class" in result.protocol
    train, test = load_labelled_splits(dataset, ("train", "test"))
    for seed in (0, 1):
        drawn = draw_fold(train.labels, test.labels, 2, 5, 7, seed)
        model = JointMAEForPointCloudClassification.from_pretrained(tmp_path / "run" / f"seed-{seed}")
        assert set(model.config.id2label.values()) == {train.class_names[label] for label in drawn.classes}
    with pytest.raises(ValueError, match="`validation_fraction` is 0.1, expected 0 with `ways`"):
        make("other", **{**fold, "validation_fraction": 0.1})


def test_few_labels_make_smaller_batches(make, caplog):
    caplog.set_level(logging.INFO)
    result = finetune_classification(make("run", train_fraction=0.05, max_steps=2))
    assert result.split_sizes == {"train": 3, "validation": 0, "test": 30, "classes": 3}
    assert result.settings["batch_size_used"] == 3 and "the batch size is 3" in caplog.text
    assert "5 % of the training labels" in result.protocol


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train_fraction": 0.0}, r"`train_fraction` is 0.0, expected in \(0, 1\]"),
        ({"validation_fraction": 1.0}, "`validation_fraction` is 1.0"),
        ({"scale_min": 2.0}, r"`scale_min` is 2.0, expected above 0, `scale_max` \(1.5\) at most"),
        ({"seeds": [1, 1]}, r"`seeds` is \[1, 1\], expected distinct"),
        ({"model_name_or_path": None}, "expected a model, or --from_scratch"),
        ({"choose_on_test": True, "baseline": "random_forest"}, "where there is nothing to choose"),
        ({"resume_from_checkpoint": "elsewhere"}, "expected 'latest'"),
        ({"resume_from_checkpoint": "latest", "overwrite_output_dir": True}, "False with `resume_from_checkpoint`"),
        ({"head": "linear", "config_overrides": "classifier_num_layers=3"}, "no `classifier_num_layers` with `head`"),
        ({"seeds": [2**64]}, "distinct numbers from 0 to"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, overrides, message):
    with pytest.raises(ValueError, match=message):
        make("run", **overrides)


def test_data_that_cannot_be_used_is_refused_with_its_row(make, dataset, tmp_path):
    rows = datasets.load_dataset(dataset, split="train")
    with pytest.raises(ValueError, match="`part_column` is 'parts', but split 'train' has the columns"):
        finetune_segmentation(make("run", SegmentationArguments, part_column="parts"))

    def broken(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(dataset, folder)
        table = rows.to_dict()
        change(table)
        datasets.Dataset.from_dict(table, features=rows.features).to_parquet(folder / "train.parquet")
        return str(folder)

    short = broken("short", lambda table: table["part_labels"][7].pop())
    with pytest.raises(
        ValueError, match=r"row 7 of split 'train' has \d+ part labels in 'part_labels' for \d+ points"
    ):
        finetune_segmentation(make("run", SegmentationArguments, dataset=short))
    missing = broken("missing", lambda table: table["label"].__setitem__(4, -1))
    with pytest.raises(ValueError, match="row 4 of split 'train' has the label -1, expected 0 to 2"):
        finetune_classification(make("run", dataset=missing))


# ---- transformers' own Trainer


def test_the_trainer_of_transformers_trains_our_heads(dataset, pretrained, tmp_path, monkeypatch, capsys):
    JointMAEPointCloudProcessor.from_config(JointMAEConfig(**CONFIG)).save_pretrained(pretrained)
    script = Path(__file__).parents[1] / "examples" / "finetune_with_trainer.py"
    options = ["--epochs", "8", "--batch_size", "11", "--learning_rate", "5e-3"]
    arguments = [pretrained, "--dataset", dataset, "--output_dir", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    state = json.loads((tmp_path / "checkpoint-48" / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert len(evaluations) == 8 and evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_accuracy"] > 60
    rights = [entry["eval_accuracy"] * 30 / 100 for entry in evaluations]
    assert rights == pytest.approx([round(right) for right in rights])  # of all 30 test shapes, none dropped
    assert JointMAEForPointCloudClassification.from_pretrained(tmp_path).config.id2label[1] == "disc"
    assert JointMAEPointCloudProcessor.from_pretrained(tmp_path).num_points == 64
