"""Clouds from data sets, and the batches of pre-training made of them."""

import copy
import re
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from jointmae_hf import JointMAEConfig
from jointmae_hf.data.augmentation import (
    SAMPLES,
    Augmentation,
    apply_affine,
    counter_generator,
    normalize_clouds,
    subsample,
)
from jointmae_hf.data.collation import EpochBatches, PreTrainingCollator, StreamBatches, split_batch
from jointmae_hf.data.labelled import load_labelled_splits
from jointmae_hf.data.loading import (
    PointClouds,
    clouds_from_arrow,
    load_point_clouds,
    load_point_dataset,
    load_point_table,
)


def small_config(**overrides) -> JointMAEConfig:
    return JointMAEConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_points": 64,
            "num_centers": [16, 8],
            "num_neighbors": [8, 4],
            "point_embed_sizes": [16, 32],
            "image_size": 16,
            "splat_size": 3,
            "patch_strides": [2, 2],
            "image_embed_sizes": [16, 32],
            "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
            "num_target_points": 8,
            **overrides,
        }
    )


def random_clouds(sizes, seed=0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(size, 3)).astype(np.float32) for size in sizes]


def in_memory(clouds: list[np.ndarray]) -> PointClouds:
    offsets = np.concatenate([[0], np.cumsum([len(cloud) for cloud in clouds])])
    return PointClouds(np.concatenate(clouds), offsets)


def as_dataset(clouds, feature=None, **columns) -> datasets.Dataset:
    feature = feature or datasets.Array2D((None, 3), "float32")
    features = datasets.Features({"points": feature, **{name: kind for name, (kind, _) in columns.items()}})
    return datasets.Dataset.from_dict(
        {"points": clouds, **{name: values for name, (_, values) in columns.items()}}, features=features
    )


def plain(coordinates) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(coordinates, type=pa.list_(pa.list_(pa.float32())))])


# ---- Reading


@pytest.mark.parametrize(
    ("feature", "sizes"),
    [
        (datasets.Array2D((7, 3), "float32"), [7, 7, 7]),
        (datasets.Array2D((7, 3), "float16"), [7, 7, 7]),
        (datasets.Array2D((None, 3), "float32"), [5, 9, 3]),
        (datasets.List(datasets.List(datasets.Value("float64"))), [5, 9, 3]),
        (datasets.List(datasets.List(datasets.Value("float32"), length=3)), [5, 9, 3]),
    ],
    ids=["fixed", "float16", "variable", "nested lists", "lists of triples"],
)
def test_every_kind_of_column_gives_the_clouds_that_were_stored(feature, sizes):
    stored = random_clouds(sizes)
    if getattr(feature, "dtype", None) == "float16":
        stored = [cloud.astype(np.float16) for cloud in stored]
    clouds = load_point_clouds(as_dataset(stored, feature))
    assert [len(clouds[i]) for i in range(len(clouds))] == sizes
    for cloud, expected in zip((clouds[i] for i in range(3)), stored, strict=True):
        if "float64" in str(feature):  # these come centred
            cloud, expected = cloud - cloud.mean(0), expected - expected.mean(0)
        np.testing.assert_allclose(cloud, expected, atol=1e-6)


def test_rows_follow_a_selection_and_many_chunks():
    stored = random_clouds(range(3, 603))
    dataset = as_dataset(stored).select([599, 0, 300, *range(300)])
    clouds = load_point_clouds(dataset)
    assert len(clouds) == 303
    for row, source in enumerate([599, 0, 300, *range(300)]):
        np.testing.assert_array_equal(clouds[row], stored[source])


def test_large_offsets_do_not_eat_the_shape():
    shape = random_clouds([50])[0].astype(np.float64)
    far = datasets.Dataset.from_dict({"points": [(shape + 5e6).tolist()]})
    cloud = load_point_clouds(far)[0]
    np.testing.assert_allclose(cloud - cloud.mean(0), shape - shape.mean(0), atol=1e-5)


def test_coordinates_that_float32_does_not_hold_are_named_by_their_row():
    def clouds(cloud) -> PointClouds:
        return clouds_from_arrow(pa.chunked_array([pa.array([GOOD, cloud], pa.list_(pa.list_(pa.float64())))]), "xyz")

    with pytest.raises(ValueError, match=r"row 1 of column 'xyz' reaches to 1e\+39, expected .* range of float32"):
        clouds([[0, 0, 0], [1e39, 1, 1]])
    with pytest.raises(ValueError, match=r"row 1 .* reaches to 1.7e\+308"):
        clouds([[1.7e308, 0, 0], [1.6e308, 1, 1]])
    with pytest.raises(ValueError, match="row 1 .* has all its 2 points in one place"):
        clouds([[0, 0, 0], [1e-60, 0, 0]])
    assert clouds([[1e39, 0, 0], [1e39 + 2e37, 0, 0]])[1].tolist() == [
        [-np.float32(1e37), 0, 0],
        [np.float32(1e37), 0, 0],
    ]


GOOD = [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "row 6 of column 'points' is an empty cloud"),
        ([[0, 0, 0], [1, float("nan"), float("inf")]], "row 6 .* has 2 coordinates that are NaN or infinite"),
        ([[0, 0, 0], [1, 1]], r"row 6 .* has a point of 2 coordinates, expected shape \(n, 3\)"),
        ([[0, 0, 0], None], "row 6 .* has a point of 0 coordinates"),
        ([[0, 0, 0], [1, None, 1]], "row 6 .* missing .null. coordinate"),
        ([[1, 2, 3]] * 5, "row 6 .* has all its 5 points in one place"),
        (None, "row 6 .* is missing .null."),
    ],
    ids=["empty", "not finite", "wrong shape", "no point", "no coordinate", "one place", "no cloud"],
)
def test_a_bad_cloud_is_named_by_its_row(row, message):
    with pytest.raises(ValueError, match=message):
        clouds_from_arrow(plain([GOOD, row, GOOD]), first_row=5)
    with pytest.raises(ValueError, match=message):  # the number counts over chunks
        clouds_from_arrow(pa.chunked_array([*plain([GOOD, GOOD]).chunks, *plain([row]).chunks]), first_row=4)


def test_a_column_of_something_else_is_refused():
    flat = datasets.Dataset.from_dict({"points": [[1.0, 2.0, 3.0]]})
    with pytest.raises(ValueError, match=r"lists of \(x, y, z\)"):
        load_point_clouds(flat)


def test_a_missing_column_error_names_the_columns_there_are():
    dataset = datasets.Dataset.from_dict({"xyz": [GOOD], "label": [0]})
    with pytest.raises(ValueError, match=r"'points', but the data set has the columns \['label', 'xyz'\]"):
        load_point_clouds(dataset)


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "/no/where", "no/where/at/all"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"`dataset` is '{name}', but there is no such folder"):
        load_point_dataset(name)


def test_parquet_files_folders_and_saved_data_sets_are_opened(tmp_path):
    dataset = as_dataset(random_clouds([4, 5]))
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    for name in ("folder", "folder/train.parquet", "folder/*.parquet", "saved", "splits"):
        assert len(load_point_clouds(load_point_dataset(str(tmp_path / name), "train"))) == 2, name
    assert len(load_point_dataset(str(tmp_path / "folder" / "train.parquet"), "train[:1]")) == 1
    with pytest.raises(FileNotFoundError, match="absent.parquet"):
        load_point_dataset(str(tmp_path / "absent.parquet"))
    for name in ("saved", "splits"):
        assert load_point_dataset(str(tmp_path / name), "train[1:]")["points"][:] == dataset["points"][1:]
        assert len(load_point_dataset(str(tmp_path / name), "train[:50%]+train")) == 3
        assert len(list(load_point_dataset(str(tmp_path / name), "train[:1]", streaming=True))) == 1


@pytest.mark.parametrize(
    ("name", "split", "splits"),
    [
        ("folder", "validation", "'train', 'test'"),
        ("folder", "train[:0]", "'train', 'test'"),
        ("x.parquet", "test", "'train'"),
        ("x.parquet", "train[:0]", "'train'"),
        ("folder/test-00000-of-00001.parquet", "train", "'test'"),
        ("saved", "test", "'train'"),
        ("saved", "train[2:]", "'train'"),
        ("saved slice", "train", "'test'"),
        ("splits", "validation[:1]", "'train', 'test'"),
    ],
)
def test_a_split_that_is_not_there_or_empty_is_refused_with_the_splits_there_are(tmp_path, name, split, splits):
    dataset = as_dataset(random_clouds([4, 5]))
    (tmp_path / "folder").mkdir()
    for file in ("folder/train-00000-of-00001.parquet", "folder/test-00000-of-00001.parquet", "x.parquet"):
        dataset.to_parquet(tmp_path / file)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    load_point_dataset(str(tmp_path / "folder"), "test[:1]").save_to_disk(tmp_path / "saved slice")
    with pytest.raises(
        ValueError, match=re.escape(f"`split` is {split!r}, but {tmp_path / name} has the splits [{splits}]")
    ):
        load_point_dataset(str(tmp_path / name), split)


def test_the_files_of_a_pattern_are_of_the_split_in_their_name(tmp_path):
    for name, size in {"train-00000-of-00001": 1, "my_val": 2, "testing": 3, "odd.split-00000-of-00002": 4}.items():
        as_dataset(random_clouds([5] * size)).to_parquet(tmp_path / f"{name}.parquet")
    for split, size in {"train": 1, "validation": 2, "test": 3, "odd.split": 4, "train+test": 4}.items():
        assert len(load_point_dataset(str(tmp_path / "*.parquet"), split)) == size, split


def test_the_path_of_a_file_is_no_pattern(tmp_path):
    for folder, size in {"p[1]": 2, "p1": 3, "p*": 4}.items():
        (tmp_path / folder).mkdir()
        as_dataset(random_clouds([5] * size)).to_parquet(tmp_path / folder / "my_test[0].parquet")
    for name, size in {"p[1]/my_test[0]": 2, "p*/my_test[0]": 4, "p1/my_test[[]0]": 3, "p?*/*": 9}.items():
        for streaming in (False, True):
            rows = load_point_dataset(str(tmp_path / f"{name}.parquet"), "test", streaming=streaming)
            assert len(list(rows)) == size, name


def save_labels(path, labels, **columns) -> str:
    """Two different clouds and more, with bare integers as labels."""
    clouds = random_clouds([5] * len(labels))
    as_dataset(clouds, label=(datasets.Value("int64"), labels), **columns).to_parquet(path)
    return str(path)


def test_bare_integers_of_any_size_are_no_classes(tmp_path):
    path = save_labels(tmp_path / "train.parquet", [2691156, 2747177, 2691156])
    with pytest.raises(ValueError, match="column 'label' has the label 2747177, which makes 2,747,178 .* for 3 rows"):
        load_labelled_splits(path, ("train",))
    (few,) = load_labelled_splits(save_labels(tmp_path / "train.parquet", [5000, 1]), ("train",))
    assert len(few.class_names) == 5001
    parts = {"parts": (datasets.List(datasets.Value("int64")), [[0, 1, 2, 3, 10_000]] * 2)}
    path = save_labels(tmp_path / "train.parquet", [0, 1], **parts)
    with pytest.raises(ValueError, match="column 'parts' has the label 10000"):
        load_labelled_splits(path, ("train",), part_column="parts")


def test_one_class_is_refused_unless_parts_are_asked_for(tmp_path):
    parts = {"parts": (datasets.List(datasets.Value("int64")), [[0, 1, 0, 1, 1]] * 4)}
    path = save_labels(tmp_path / "train.parquet", [7] * 4, **parts)
    splits = ("train[:2]", "train[2:]")
    with pytest.raises(ValueError, match=r"'label' has the label 7 in every row of 'train\[:2\]', 'train\[2:\]'"):
        load_labelled_splits(path, splits)
    assert load_labelled_splits(path, splits, part_column="parts")[1].part_names == ["0", "1"]


def test_fingerprints_tell_contents_apart():
    clouds = random_clouds([5, 6])
    same, moved = in_memory(clouds), in_memory(clouds[::-1])
    assert same.fingerprint() == in_memory(random_clouds([5, 6])).fingerprint() != moved.fingerprint()


def test_a_point_table_is_normalised_and_fixed_by_its_seed(tmp_path):
    label = datasets.ClassLabel(names=["box", "ball"])
    as_dataset(random_clouds([20, 8, 50]), label=(label, [1, 0, 1])).to_parquet(tmp_path / "test.parquet")
    tables = [load_point_table(str(tmp_path / "test.parquet"), "test", num_points=16, seed=s) for s in (0, 0, 1)]
    assert tables[0].points.shape == (3, 16, 3) and tables[0].points.dtype == np.float32
    np.testing.assert_allclose(tables[0].points.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(tables[0].points, axis=2).max(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(tables[0].points, tables[1].points)
    assert (tables[0].points != tables[2].points).any()
    assert tables[0].labels.tolist() == [1, 0, 1] and tables[0].class_names == ["box", "ball"]
    unlabelled = load_point_table(str(tmp_path / "test.parquet"), "test", label_column="kind", num_points=16)
    assert unlabelled.labels is None and unlabelled.class_names is None


# ---- Augmentation


def test_generators_differ_in_every_part_of_their_key():
    keys = [(0, SAMPLES, 0, 0), (1, SAMPLES, 0, 0), (0, SAMPLES + 1, 0, 0), (0, SAMPLES, 1, 0), (0, SAMPLES, 0, 1)]
    draws = [counter_generator(*key).random(4).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws[0] == counter_generator(*keys[0]).random(4).tolist()


def test_subsampling_takes_points_once_and_repeats_only_when_there_are_too_few():
    generator = counter_generator(0, SAMPLES, 0)
    assert len(set(subsample(generator, 100, 30).tolist())) == 30
    assert np.arange(10)[subsample(generator, 10, 10)].tolist() == list(range(10))
    counts = np.bincount(subsample(generator, 10, 34), minlength=10)
    assert counts.sum() == 34 and set(counts.tolist()) == {3, 4}


def test_normalised_clouds_have_mean_zero_and_radius_one():
    clouds = np.stack(random_clouds([40, 40])) * np.float32(17) + np.float32(3)
    normalised = normalize_clouds(clouds)
    np.testing.assert_allclose(normalised.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(normalised, axis=2).max(1), 1, rtol=1e-6)
    assert not normalize_clouds(np.ones((1, 5, 3), dtype=np.float32)).any()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e-15, 1e15, 1e20, 5e37])
def test_clouds_of_every_scale_of_float32_are_normalised(scale):
    clouds = (np.stack(random_clouds([40] * 3)) * scale).astype(np.float32)
    clouds[0] = scale
    clouds[1, :, 0] = 1  # small beside its distance
    exact = clouds.astype(np.float64)
    exact -= exact.mean(1, keepdims=True)
    exact[1:] /= np.linalg.norm(exact[1:], axis=2).max(1)[:, None, None]
    normalised = normalize_clouds(clouds)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, exact, atol=2e-6)


def test_clouds_at_both_ends_of_their_type_are_normalised():
    for dtype in (np.float16, np.float32):
        cloud = np.array([[[1, 0, 0], [1, 0, 0], [1, 0, 0], [-1, 0, 0]]], dtype=dtype) * np.finfo(dtype).max
        np.testing.assert_allclose(normalize_clouds(cloud)[0, :, 0], [1 / 3, 1 / 3, 1 / 3, -1], rtol=1e-3)


def test_extreme_clouds_change_no_digit_of_others():
    clouds = np.stack(random_clouds([40] * 3)) * np.float32(17) + np.float32(3)
    mean = clouds.transpose(0, 2, 1).copy().mean(2, dtype=np.float64).astype(np.float32)[:, None]
    x, y, z = np.moveaxis(clouds - mean, 2, 0)
    radius = np.sqrt((x * x + y * y + z * z).max(1))
    expected = (clouds - mean) / radius[:, None, None]
    clouds[1] *= np.float32(1e30)
    np.testing.assert_array_equal(normalize_clouds(clouds)[[0, 2]], expected[[0, 2]])


def test_augmentation_scales_and_shifts_each_axis_within_its_range():
    maps = [Augmentation().draw(counter_generator(0, SAMPLES, 0, i)) for i in range(300)]
    scale = np.stack([np.diag(matrix) for matrix, _ in maps])
    shift = np.stack([shift for _, shift in maps])
    assert all(np.array_equal(matrix, np.diag(np.diag(matrix))) for matrix, _ in maps)
    assert 2 / 3 <= scale.min() < 0.69 and 1.47 < scale.max() <= 3 / 2
    assert -0.2 <= shift.min() < -0.19 and 0.19 < shift.max() <= 0.2
    assert np.abs(np.corrcoef(np.concatenate([scale, shift], axis=1).T) - np.eye(6)).max() < 0.25


@pytest.mark.parametrize("rotation", ["x", "y", "z", "so3"])
def test_rotations_keep_lengths_handedness_and_their_axis(rotation):
    matrix, _ = Augmentation((1, 1), 0, rotation).draw(counter_generator(0, SAMPLES, 0))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)
    assert abs(matrix - np.eye(3)).max() > 0.1
    if rotation != "so3":
        axis = np.eye(3)["xyz".index(rotation)]
        np.testing.assert_allclose(matrix @ axis, axis, atol=1e-12)
    points = np.stack(random_clouds([5]))
    np.testing.assert_allclose(apply_affine(points, matrix[None], np.ones((1, 3)))[0], points[0] @ matrix.T + 1, 1e-5)


def test_tilts_turn_about_any_axis_by_no_more_than_they_may():
    maps = [Augmentation((1, 1), 0, max_tilt=15).draw(counter_generator(0, SAMPLES, 0, i))[0] for i in range(300)]
    np.testing.assert_allclose([matrix @ matrix.T for matrix in maps], [np.eye(3)] * 300, atol=1e-12)
    angles = np.rad2deg([np.arccos((np.trace(matrix) - 1) / 2) for matrix in maps])
    assert angles.min() < 0.5 and 14.5 < angles.max() <= 15
    axes = np.stack([[m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]] for m in maps])
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    np.testing.assert_allclose(axes.T @ axes / 300, np.eye(3) / 3, atol=0.07)  # no direction is preferred


def test_jitter_is_noise_of_a_deviation_of_its_own_for_each_sample_and_view():
    clouds, keys = random_clouds([64] * 40), [(0, i) for i in range(40)]
    config = small_config(agreement_loss_weight=1.0)
    plain, noisy = (
        PreTrainingCollator(config, Augmentation((1, 1), 0, max_jitter=jitter), 0)(clouds, keys) for jitter in (0, 0.1)
    )
    assert torch.equal(plain["point_values"], plain["second_point_values"])
    noise = noisy["point_values"] - plain["point_values"]
    deviation = noise.flatten(1).std(1)
    assert 0 < deviation.min() < 0.02 and 0.08 < deviation.max() < 0.12
    assert noise.mean().abs() < 0.005
    other = noisy["second_point_values"] - plain["second_point_values"]
    assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 0.05


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0, 1)},
        {"scale": (2, 1)},
        {"max_shift": -1},
        {"rotation": "w"},
        {"max_tilt": 181},
        {"max_tilt": float("nan")},
        {"max_jitter": -0.1},
        {"max_jitter": float("inf")},
    ],
)
def test_impossible_augmentations_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


# ---- Batches


def batches_of(clouds, part=(32, 1, 0, 1), seed=0, **overrides) -> EpochBatches:
    config = small_config(**overrides)
    return EpochBatches(in_memory(clouds), PreTrainingCollator(config, Augmentation(), seed), *part)


def test_a_batch_holds_all_that_the_model_would_draw_itself():
    batch, _ = batches_of(random_clouds([100] * 8), (4, 1, 0, 1), modality_dropout=0.5)[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {
        "point_values": (4, 64, 3),
        "view": (4,),
        "point_noise": (4, 8),
        "patch_noise": (4, 16),
        "image_dropped": (4,),
    }
    assert set(batches_of(random_clouds([100] * 8), (4, 1, 0, 1))[0][0]) == set(shapes) - {"image_dropped"}
    alone = batches_of(random_clouds([100] * 8), (4, 1, 0, 1), use_image_branch=False)[0][0]
    assert set(alone) == {"point_values", "point_noise"}


def test_points_are_augmented_before_they_are_projected():
    """The image must show the augmented points: the batch holds points alone, moved off the unit sphere's centre."""
    from jointmae_hf.geometry_joint_mae import project_depth, view_projection
    from jointmae_hf.modeling_joint_mae import JointMAEForPreTraining

    batches = batches_of(random_clouds([100] * 8), (4, 1, 0, 1))
    batch, _ = batches[0]
    assert "pixel_values" not in batch
    raw = normalize_clouds(np.stack([batches.clouds[i][:64] for _, i in batches.keys(0)]))
    assert np.abs(batch["point_values"].mean(1).numpy() - raw.mean(1)).max() > 0.02
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = JointMAEForPreTraining(small_config())(**batch)
    projection = view_projection(batch["point_values"], batch["view"], 16)
    torch.testing.assert_close(outputs.projection, projection)
    torch.testing.assert_close(outputs.pixel_values, project_depth(batch["point_values"], projection, 16, 3))


def test_views_and_masks_vary_between_samples_and_epochs():
    batches = batches_of(random_clouds([100] * 30), (30, 1, 0, 1))
    first, second = batches[0][0], batches[1][0]
    assert first["view"].unique().tolist() == [0, 1, 2]
    assert len(first["point_noise"].unique()) > 200 and first["point_noise"].ne(second["point_noise"]).all()


def test_an_epoch_sees_each_cloud_once_in_an_order_of_its_own():
    batches = batches_of(random_clouds([70] * 25), (8, 1, 0, 1))
    epochs = [[batches.keys(n) for n in range(3 * e, 3 * e + 3)] for e in range(2)]
    for number, epoch in enumerate(epochs):
        seen = [key for keys in epoch for key in keys]
        assert len(set(seen)) == 24 and {e for e, _ in seen} == {number}
    assert [i for keys in epochs[0] for _, i in keys] != [i for keys in epochs[1] for _, i in keys]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_processes_and_accumulation_divide_the_same_global_batch(processes, accumulation):
    clouds = random_clouds([50, 70, 90, 64] * 6)
    whole = batches_of(clouds, (8, 1, 0, 1))
    parts = [batches_of(clouds, (8, processes, rank, accumulation)) for rank in range(processes)]
    for step in (0, 1, 4):
        expected, _ = whole[step]
        numbers = range(step * accumulation, (step + 1) * accumulation)
        found = [parts[rank][number][0] for number in numbers for rank in range(processes)]
        for name, tensor in expected.items():  # bit for bit: a sample does not depend on its neighbours
            assert torch.equal(torch.cat([part[name] for part in found]), tensor), name


def test_a_seed_changes_order_and_samples():
    clouds = random_clouds([70] * 16)
    assert batches_of(clouds, (8, 1, 0, 1), seed=0).keys(0) != batches_of(clouds, (8, 1, 0, 1), seed=1).keys(0)


def test_a_batch_that_does_not_divide_is_refused():
    assert split_batch(12, 2, 3) == 2
    with pytest.raises(ValueError, match=r"`batch_size` is 10, .* 2 process\(es\) x 2 accumulation step\(s\) = 4"):
        split_batch(10, 2, 2)
    with pytest.raises(ValueError, match="`batch_size` is 32, but the data set has only 3 clouds"):
        batches_of(random_clouds([70] * 3))


# ---- Streams


def stream_of(clouds, shards=1) -> datasets.IterableDataset:
    return as_dataset(clouds).to_iterable_dataset(num_shards=shards)


def stream_batches(stream, size=4, buffer=0, processes=1, rank=0, position=None) -> StreamBatches:
    collator = PreTrainingCollator(small_config(), Augmentation(), 0)
    return StreamBatches(
        stream,
        "points",
        collator,
        size,
        processes,
        rank,
        shuffle_buffer_size=buffer,
        position=position,
    )


def test_a_second_view_is_another_one_and_leaves_the_rest_alone():
    clouds, keys = random_clouds([200, 300]), [(0, 0), (0, 1)]
    config = small_config()
    comparing = small_config(agreement_loss_weight=1.0)
    alone = PreTrainingCollator(config, Augmentation(), 0)(clouds, keys)
    both = PreTrainingCollator(comparing, Augmentation(), 0)(clouds, keys)
    assert set(both) - set(alone) == {"second_point_values"}
    assert all(torch.equal(both[name], alone[name]) for name in alone)
    first, second = both["point_values"], both["second_point_values"]
    assert first.shape == second.shape and (first.mean(1) - second.mean(1)).abs().amax() > 0.01


def test_a_stream_in_order_gives_the_samples_of_the_table():
    clouds = random_clouds(range(60, 70))
    collator = PreTrainingCollator(small_config(), Augmentation(), 0)
    found = [batch for batch, _ in islice(stream_batches(stream_of(clouds)), 5)]
    keys = [divmod(row, 10) for row in range(20)]  # two passes over ten rows
    for number, batch in enumerate(found):
        part = keys[4 * number : 4 * number + 4]
        expected = collator([clouds[index] for _, index in part], part)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_two_processes_share_the_rows_of_a_stream():
    clouds = random_clouds(range(60, 76))
    whole = [batch["point_values"] for batch, _ in islice(stream_batches(stream_of(clouds)), 4)]
    halves = [
        [batch["point_values"] for batch, _ in islice(stream_batches(stream_of(clouds), processes=2, rank=rank), 4)]
        for rank in (0, 1)
    ]
    for number in range(4):
        even, odd = halves[0][number], halves[1][number]
        assert torch.equal(torch.stack([even, odd], dim=1).flatten(0, 1), whole[number])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("buffer", [0, 5])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_resumes_at_the_exact_sample(shards, buffer, processes):
    make = lambda position=None: stream_batches(  # noqa: E731
        stream_of(random_clouds(range(60, 83)), shards), 6, buffer, processes, processes - 1, position
    )
    straight = list(islice(make(), 12))  # three passes and more
    for stop in (1, 3, 4, 8):
        resumed = list(islice(make(copy.deepcopy(straight[stop - 1][1])), 12 - stop))
        for (found, _), (expected, _) in zip(resumed, straight[stop:], strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_shuffled_pass_holds_each_row_once_in_another_order():
    clouds = random_clouds([64] * 20)
    batches = stream_batches(stream_of(clouds), 20, buffer=7)
    orders = []
    for number, (batch, _) in enumerate(islice(batches, 2)):
        table = batches.collator(clouds, [(number, index) for index in range(20)])["point_values"]
        match = (batch["point_values"].flatten(1)[:, None] == table.flatten(1)[None]).all(-1)
        orders.append(match.int().argmax(1).tolist())
        assert sorted(orders[-1]) == list(range(20)) != orders[-1]
    assert orders[0] != orders[1]


def test_a_bad_row_of_a_stream_is_named():
    clouds = random_clouds([64] * 6)
    clouds[4][3] = np.nan
    with pytest.raises(ValueError, match="row 4 of column 'points' has 3 coordinates"):
        list(islice(stream_batches(stream_of(clouds), 2, buffer=3), 3))
