"""Linear SVM, few-shot, retrieval, shape histograms and part segmentation: what each measures, and on what."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from child_processes import run_on_two
from test_finetuning import CONFIG, write_dataset

from jointmae_hf import JointMAEConfig, JointMAEForPartSegmentation, JointMAEForPreTraining
from jointmae_hf.data.labelled import load_labelled_splits
from jointmae_hf.data.loading import fixed_subsample
from jointmae_hf.evaluation import (
    draw_fold,
    extract_features,
    linear_svm,
    part_iou,
    read_result,
    retrieval_metrics,
    segment_clouds,
    segmentation_metrics,
    shape_histograms,
    tasks,
)
from jointmae_hf.evaluation.features import map_batches
from jointmae_hf.evaluation.results import ResultError, weights_digest
from jointmae_hf.evaluation.segmentation import class_parts
from jointmae_hf.evaluation.tasks import (
    FewShotArguments,
    LinearSvmArguments,
    RetrievalArguments,
    evaluate_few_shot,
    evaluate_linear_svm,
    evaluate_retrieval,
    load_encoder,
)
from jointmae_hf.publishing.tables import check_one_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("shapes") / "data", sizes=(45, 30))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(3)
    JointMAEForPreTraining(JointMAEConfig(**CONFIG)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(dataset, pretrained, tmp_path):
    def make(kind=LinearSvmArguments, **overrides):
        defaults = {"dataset": dataset, "model_name_or_path": pretrained, "num_points": 64, "device": "cpu"}
        return kind(**{**defaults, "output": str(tmp_path / "result.json"), **overrides})

    return make


# ---- Tasks from arguments to results


def test_linear_svm_is_measured_on_features_of_each_subsample(make, dataset, pretrained, tmp_path):
    result = evaluate_linear_svm(make(seeds=[0, 4]))
    train, test = load_labelled_splits(dataset, ("train", "test"))
    for seed, value in zip(result.seeds, result.metrics["accuracy"]["values"], strict=True):
        encoder = load_encoder(pretrained)
        features = [extract_features(encoder, fixed_subsample(part.clouds, 64, seed)) for part in (train, test)]
        assert value == linear_svm(features[0], train.labels, features[1], test.labels)["accuracy"]
    assert read_result(tmp_path / "result.json") == result
    assert result.split_sizes == {"train": 45, "test": 30, "classes": 3}
    assert result.dataset["splits"]["test"] == test.fingerprint()
    assert not result.chosen_on_test and result.settings["C_used"] == [0.01, 0.01]


def test_results_of_other_measurements_are_not_replaced_unasked(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    evaluate_linear_svm(make(output=None))
    evaluate_linear_svm(make(output=None, seeds=[1]))
    assert read_result("outputs/linear_svm-pretrained/result.json").seeds == [1]
    with pytest.raises(ValueError, match=r"holds the result of another measurement \(`num_points` is 64 there"):
        evaluate_linear_svm(make(output=None, num_points=32))
    evaluate_linear_svm(make(output=None, train_fraction=0.5))
    assert Path("outputs/linear_svm-pretrained-50-percent/result.json").exists()


def test_a_model_has_one_digest_whatever_it_was_saved_in(make, pretrained, tmp_path):
    whole = JointMAEForPreTraining.from_pretrained(pretrained).to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "half")
    result = evaluate_linear_svm(make(model_name_or_path=str(tmp_path / "half")))
    assert result.model["weights"] == weights_digest(whole.float().joint_mae)


def test_the_same_weights_with_other_groups_are_another_model(make, monkeypatch, pretrained, tmp_path):
    monkeypatch.chdir(tmp_path)
    first = evaluate_linear_svm(make(output=None))
    assert first.model["reading"]["num_centers"] == [16, 8]
    other = JointMAEForPreTraining.from_pretrained(pretrained, num_centers=[32, 8])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds the result of another measurement \(`reading` is .*16, 8.* there"):
        evaluate_linear_svm(make(output=None, model_name_or_path=str(tmp_path / "other")))
    second = evaluate_linear_svm(make(model_name_or_path=str(tmp_path / "other")))
    assert second.model["weights"] == first.model["weights"]
    with pytest.raises(ResultError, match="several pre-trained models: .* with other groups or pooled layers"):
        check_one_model([first, second])


def test_untrained_weights_are_those_that_pretraining_starts_from(make, pretrained):
    result = evaluate_linear_svm(make(untrained=True, seeds=[0, 1]))
    assert result.model["initialization"] == "untrained" and result.model["weights"] is None
    first, second = (load_encoder(pretrained, True, seed) for seed in (0, 1))
    assert not torch.equal(first.modality_embeddings, second.modality_embeddings)
    from jointmae_hf.training.pretraining import build_untrained_model

    expected = build_untrained_model(JointMAEConfig.from_pretrained(pretrained), 1).joint_mae
    assert torch.equal(second.modality_embeddings, expected.modality_embeddings)


def test_seeds_that_change_nothing_are_not_counted(make, tmp_path, caplog):
    fixed = write_dataset(tmp_path / "fixed", sizes=(9, 6), num_points=(64, 65))
    result = evaluate_linear_svm(make(dataset=fixed, seeds=[0, 1, 2]))
    assert result.seeds == [0] and "every seed would give the same result" in caplog.text
    assert evaluate_linear_svm(make(dataset=fixed, seeds=[0, 1], untrained=True)).seeds == [0, 1]


def test_C_is_chosen_on_training_shapes_unless_the_flag_says_otherwise(make):
    candidates = [1e-7, 0.01, 1.0]
    honest = evaluate_linear_svm(make(C=candidates))
    assert "chosen on a fifth of the training split" in honest.protocol and not honest.chosen_on_test
    chosen = evaluate_linear_svm(make(C=candidates, choose_on_test=True))
    assert chosen.chosen_on_test and "THE TEST SPLIT" in chosen.protocol
    every = [evaluate_linear_svm(make(C=[C])).metrics["accuracy"]["mean"] for C in candidates]
    assert chosen.metrics["accuracy"]["mean"] == max(every)
    assert honest.metrics["accuracy"]["mean"] == every[candidates.index(honest.settings["C_used"][0])]


def test_a_random_forest_on_histograms_tells_simple_shapes_apart(make):
    result = evaluate_linear_svm(make(baseline="random_forest", model_name_or_path=None, train_fraction=0.5))
    assert result.metrics["accuracy"]["mean"] >= 90
    assert result.model["initialization"] == "random_forest" and result.split_sizes["train"] == 24


def test_few_shot_has_a_fold_for_each_seed(make):
    result = evaluate_few_shot(make(FewShotArguments, ways=3, shots=1, queries=10))
    assert result.seeds == list(range(10)) and result.metrics["accuracy"]["deviation"] > 0
    assert (result.split_sizes["train"], result.split_sizes["test"]) == (3, 30)
    with pytest.raises(ValueError, match=r"0 of 3 classes have 5 training shapes .* `queries` up to 10"):
        evaluate_few_shot(make(FewShotArguments, ways=2, shots=5))


def test_retrieval_searches_what_it_is_told_to(make):
    inner = evaluate_retrieval(make(RetrievalArguments))
    across = evaluate_retrieval(make(RetrievalArguments, gallery="train"))
    assert inner.metrics["map"] != across.metrics["map"]
    assert inner.metrics["top_1"]["mean"] <= inner.metrics["top_5"]["mean"] <= inner.metrics["top_10"]["mean"]


@pytest.mark.parametrize(
    "kind, overrides, message",
    [
        (LinearSvmArguments, {"model_name_or_path": None}, "expected a model, or --untrained"),
        (LinearSvmArguments, {"C": [0.0]}, "expected positive numbers"),
        (LinearSvmArguments, {"choose_on_test": True}, "expected false with a single `C`"),
        (
            LinearSvmArguments,
            {"choose_on_test": True, "C": [0.01, 1.0], "baseline": "random_forest"},
            "where there is nothing to choose",
        ),
        (FewShotArguments, {"ways": 1}, "`ways` is 1, expected 2 or more"),
        (RetrievalArguments, {"output": "/"}, "expected a file, but there is a folder"),
        (RetrievalArguments, {"seeds": []}, r"`seeds` is \[\], expected distinct"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, kind, overrides, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **overrides)


# ---- Their parts


def test_threads_extract_the_same_features(pretrained, dataset):
    points = fixed_subsample(load_labelled_splits(dataset, ("train",))[0].clouds, 64)
    encoder = load_encoder(pretrained)
    alone = extract_features(encoder, points, batch_size=8)
    torch.set_num_threads(2)
    assert np.array_equal(extract_features(encoder, points, batch_size=8), alone)
    by_layer = extract_features(load_encoder(pretrained), points, layers=[0, -1], batch_size=8)
    assert np.array_equal(by_layer[1], alone) and not np.array_equal(by_layer[0], alone)


def test_threads_share_out_batches_and_not_a_single_one():
    torch.set_num_threads(2)
    cpu = torch.device("cpu")
    for num_clouds, threads in ((8, [2]), (9, [1, 1])):
        assert map_batches(lambda rows: torch.get_num_threads(), num_clouds, 8, cpu) == threads


def test_progress_is_shown_over_batches_of_clouds(make, capsys):
    evaluate_linear_svm(make(seeds=[4], batch_size=15))
    shown = capsys.readouterr().err
    assert "linear_svm, seed 4, train" in shown and "0/3" in shown
    assert "linear_svm, seed 4, test" in shown and "0/2" in shown


def test_a_fold_takes_its_support_and_its_queries_from_their_splits():
    train, test = np.repeat(np.arange(6), 8), np.repeat(np.arange(6), [7, 7, 7, 7, 7, 3])
    fold = draw_fold(train, test, ways=3, shots=4, queries=5, seed=1)
    assert len(set(fold.classes)) == 3 and 5 not in fold.classes  # too few test shapes
    assert train[fold.support].tolist() == np.repeat(fold.classes, 4).tolist()
    assert test[fold.queries].tolist() == np.repeat(fold.classes, 5).tolist()
    assert len(set(fold.support)) == 12 and len(set(fold.queries)) == 15
    again, other = (draw_fold(train, test, 3, 4, 5, seed) for seed in (1, 2))
    assert np.array_equal(again.support, fold.support) and not np.array_equal(other.support, fold.support)
    with pytest.raises(ValueError, match="only 0 classes have 9 training shapes at all"):
        draw_fold(train, test, 3, 9, 5, 0)


def test_retrieval_metrics_of_a_case_worked_by_hand():
    # On a circle, at growing angles from the first: b, a, b. Ranks of the query's class: 2.
    angles = np.array([0.0, 0.1, 0.2, 0.3])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.array([0, 1, 0, 1])
    metrics = retrieval_metrics(features[:1], labels[:1], features[1:], labels[1:], ks=(1, 2))
    assert metrics == {"map": 50.0, "top_1": 0.0, "top_2": 100.0, "queries": 1}
    # Two relevant shapes at ranks 1 and 3: (1 + 2 / 3) / 2.
    metrics = retrieval_metrics(features[:1], np.array([1]), features[1:], labels[1:])
    assert metrics["map"] == pytest.approx(100 * 5 / 6)
    # A shape is not its own neighbour, and one that is alone in its class is left out.
    metrics = retrieval_metrics(features[:3], labels[:3])
    assert metrics["queries"] == 2 and metrics["map"] == 50.0
    with pytest.raises(ValueError, match="nothing to be found"):
        retrieval_metrics(features[:2], np.array([0, 1]))


def test_histograms_describe_the_shape_and_not_the_order_of_its_points():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(2, 500, 3)).astype(np.float32)
    points[1] *= [1, 1, 0.05]
    points /= np.linalg.norm(points, axis=-1).max(1)[:, None, None]
    features = shape_histograms(points)
    assert features.shape == (2, 278) and np.isfinite(features).all()
    np.testing.assert_allclose(features[:, :64].sum(1), 1, atol=1e-6)
    shuffled = shape_histograms(points[:, generator.permutation(500)])
    assert np.abs(shuffled - features).sum(1).max() < 0.5 * np.abs(features[0] - features[1]).sum()
    line = np.zeros((1, 100, 3), dtype=np.float32)  # flat in two directions: nothing to divide by
    line[0, :, 0] = np.linspace(-1, 1, 100)
    assert np.isfinite(shape_histograms(line)).all()


def test_part_iou_of_cases_worked_by_hand():
    parts = np.array([True, True, False])
    labels = np.array([0, 0, 1, 1])
    assert part_iou(labels, labels, parts) == 1.0
    assert part_iou(np.array([0, 0, 0, 1]), labels, parts) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert part_iou(np.zeros(4, int), np.zeros(4, int), parts) == 1.0  # neither there nor predicted
    assert part_iou(np.array([0, 0, 1, 1]), np.array([0, 0, 2, -100]), parts) == pytest.approx((1 + 0 + 0) / 3)


def test_class_miou_weighs_classes_and_instance_miou_shapes():
    right, wrong = np.array([0, 0]), np.array([1, 1])
    allowed = np.array([[True, False], [True, False]])
    metrics = segmentation_metrics([right, right, wrong], [right] * 3, np.array([0, 0, 1]), allowed)
    assert metrics["instance_miou"] == pytest.approx(200 / 3) and metrics["class_miou"] == 50.0
    assert metrics["point_accuracy"] == pytest.approx(200 / 3)
    unlabelled = np.array([-100, -100])
    assert segmentation_metrics([wrong, right], [unlabelled, right], np.array([0, 0]), allowed)["instance_miou"] == 100
    with pytest.raises(ValueError, match="no labelled point"):
        segmentation_metrics([right], [unlabelled], np.array([0]), allowed)


def test_clouds_of_any_size_are_segmented_whole(dataset):
    (data,) = load_labelled_splits(dataset, ("test",), part_column="part_labels")
    torch.manual_seed(0)
    config = JointMAEConfig(**CONFIG, num_labels=4, num_object_classes=3)
    model = JointMAEForPartSegmentation(config).train()
    clouds = [data.clouds[index] for index in range(len(data))]
    allowed = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    found = segment_clouds(model, clouds, 64, data.labels, allowed, batch_size=7)
    assert [len(parts) for parts in found] == [len(cloud) for cloud in clouds]
    assert all(allowed[label][parts].all() for parts, label in zip(found, data.labels, strict=True))
    assert model.training
    again = segment_clouds(model, clouds, 64, data.labels, allowed, batch_size=30)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))
    # With exactly as many points as the network takes, its own scores decide.
    exact = fixed_subsample(data.clouds, 64)[:2]
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(exact), object_class=torch.from_numpy(data.labels[:2])).logits
    found = segment_clouds(model, list(exact), 64, data.labels[:2])
    assert np.array_equal(np.stack(found), logits.argmax(-1).numpy())


def evaluate_in_child(arguments: list, environment: dict[str, str]):
    os.environ.update(environment)
    os.setpgrp()
    for each in arguments:
        result = EVALUATE[type(each)](each)
        assert (result is None) == (environment["RANK"] != "0")


EVALUATE = {
    LinearSvmArguments: evaluate_linear_svm,
    FewShotArguments: evaluate_few_shot,
    RetrievalArguments: evaluate_retrieval,
}


def test_two_processes_share_the_features_and_find_what_one_finds(make, processes, tmp_path):
    wanted = {
        "svm": (LinearSvmArguments, {"seeds": [0, 1], "batch_size": 16}),  # 3 batches for two, and 2
        "one batch": (RetrievalArguments, {"batch_size": 64}),  # the first process has nothing to do
        "few": (FewShotArguments, {"seeds": [0, 1], "ways": 2, "shots": 5, "queries": 5}),
        "forest": (LinearSvmArguments, {"baseline": "random_forest"}),
    }

    def arguments(folder: str) -> list:
        return [make(kind, **set_, output=str(tmp_path / folder / name)) for name, (kind, set_) in wanted.items()]

    run_on_two(processes, evaluate_in_child, arguments("two"))
    for each in arguments("one"):
        EVALUATE[type(each)](each)
    for name in wanted:
        one, two = (read_result(tmp_path / folder / name) for folder in ("one", "two"))
        assert one.metrics == two.metrics and one.split_sizes == two.split_sizes, name
        assert (one.settings["num_processes"], two.settings["num_processes"]) == (1, 2)
        assert "torchrun --nproc_per_node 2" in two.command


def test_a_task_that_was_stopped_goes_on_after_the_seeds_that_it_had_measured(make, pretrained, tmp_path, monkeypatch):
    straight = evaluate_linear_svm(make(seeds=[0, 1, 2], C=[0.01, 1.0]))
    measured = []

    def count(*args):
        measured.append(args)
        if len(measured) == 7:  # two candidates and the last fit a seed
            raise KeyboardInterrupt
        return linear_svm(*args)

    monkeypatch.setattr(tasks, "linear_svm", count)
    kept = tmp_path / "stopped" / "result.json.seeds"
    stopped = make(seeds=[0, 1, 2], C=[0.01, 1.0], output=str(tmp_path / "stopped" / "result.json"))
    with pytest.raises(KeyboardInterrupt):
        evaluate_linear_svm(stopped)
    assert kept.exists() and not Path(stopped.output).exists()
    resumed = evaluate_linear_svm(stopped)
    assert len(measured) == 7 + 3 and not kept.exists()
    assert resumed.metrics == straight.metrics and resumed.settings["C_used"] == straight.settings["C_used"]
    assert resumed.split_sizes == straight.split_sizes


@pytest.mark.parametrize("change", ["setting", "weights", "damaged"])
def test_seeds_measured_under_other_conditions_are_measured_again(make, pretrained, tmp_path, monkeypatch, change):
    def stop_at_second_seed(self, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return features(self, seed)

    features = tasks._FrozenTask.features
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tasks._FrozenTask, "features", stop_at_second_seed)
        evaluate_linear_svm(make(seeds=[0, 1]))
    overrides = {}
    if change == "setting":
        overrides = {"num_points": 48}
    elif change == "weights":
        torch.manual_seed(4)
        overrides = {"model_name_or_path": str(tmp_path / "other")}
        JointMAEForPreTraining(JointMAEConfig(**CONFIG)).save_pretrained(tmp_path / "other")
    else:
        (tmp_path / "result.json.seeds").write_text('{"runs": {"0"')
    asked = []
    monkeypatch.setattr(tasks._FrozenTask, "features", lambda self, seed: asked.append(seed) or features(self, seed))
    evaluate_linear_svm(make(seeds=[0, 1], **overrides))
    assert asked == [0, 1]


class BySide(torch.nn.Module):
    """Segments by the sign of x, and keeps the masks that it was given."""

    config, device = SimpleNamespace(num_object_classes=0), torch.device("cpu")

    def forward(self, points: torch.Tensor, point_mask: torch.Tensor | None = None) -> SimpleNamespace:
        self.point_mask = point_mask
        return SimpleNamespace(logits=20 * torch.stack([points[..., 0], -points[..., 0]], dim=-1))


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_small_and_large_clouds_are_segmented_alike_in_any_unit(unit):
    small, large = (np.random.default_rng(size).normal(size=(size, 3)) for size in (40, 3000))
    model = BySide()
    found = segment_clouds(model, [unit * (small - small.mean(0)), unit * large], 64)
    assert model.point_mask.sum(1).tolist() == [40, 64]  # a small cloud is padded, not repeated
    assert np.array_equal(found[0], small[:, 0] < small[:, 0].mean())
    assert np.mean(found[1] == (large[:, 0] < 0)) > 0.8
    assert np.mean(found[1] == segment_clouds(model, [small, large], 64)[1]) > 0.99  # but for rounding


def test_parts_of_a_class_are_those_of_its_shapes():
    parts = class_parts([np.array([0, 1]), np.array([2, -100])], np.array([0, 1]), 3, 3)
    assert parts.tolist() == [[True, True, False], [False, False, True], [False, False, False]]


@pytest.mark.parametrize(
    ("splits", "found"),
    [
        (("train", "train"), "45 of their 45 and 45"),
        (("train", "train[:10]"), "10 of their 45 and 10"),
        (("train[:20]", "train[9:]"), "11 of their 20 and 36"),
        (("train[:3]", "test", "test+train[:3]"), "3 of their 3 and 33"),
    ],
)
def test_splits_that_are_the_same_clouds_are_refused(dataset, splits, found):
    with pytest.raises(ValueError, match=f"splits .* share {found} different clouds"):
        load_labelled_splits(dataset, splits)


def test_splits_may_share_a_few_clouds_with_a_warning(dataset, caplog):
    train, test = load_labelled_splits(dataset, ("train[:20]", "train[10:]"))
    assert (len(train), len(test)) == (20, 35)
    assert "share 10 of their 20 and 35 different clouds: these are not held out" in caplog.text


def test_no_score_is_measured_on_the_training_split(make, dataset):
    with pytest.raises(ValueError, match="splits 'train' and 'train' share"):
        evaluate_linear_svm(make(test_split="train"))
    with pytest.raises(ValueError, match=r"`split` is 'test', but .* has the splits \['train'\]"):
        evaluate_linear_svm(make(dataset=f"{dataset}/train.parquet"))


def test_splits_of_one_data_set_have_the_same_classes(dataset, tmp_path):
    import datasets

    rows = datasets.load_dataset(dataset)
    names = datasets.ClassLabel(names=["disc", "rod", "ball"])
    rows["test"] = rows["test"].cast(datasets.Features({**rows["test"].features, "label": names}))
    rows.save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="split 'test' has other class names than split 'train'"):
        load_labelled_splits(str(tmp_path / "other"), ("train", "test"))
