"""Builders of data sets on small files in exactly the layout and encoding that the standard sets come in."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import datasets
import h5py
import numpy as np
import pytest
from hub_server import HubServer

from jointmae_hf.data.builders import (
    ShapeItem,
    ShapeSource,
    build_dataset,
    core,
    draw_contact_sheet,
    open_folder,
    open_source,
    write_card,
)
from jointmae_hf.data.builders.core import normalize_unit_sphere
from jointmae_hf.data.builders.modelnet import MODELNET10_CLASSES, MODELNET40_CLASSES
from jointmae_hf.data.builders.reading import plain_name, read_shape_file
from jointmae_hf.data.builders.scanobjectnn import SCANOBJECTNN_CLASSES
from jointmae_hf.data.builders.shapenet import PART_BOUNDS, SHAPENET55_CLASSES, SHAPENETPART_CLASSES
from jointmae_hf.data.loading import load_point_clouds, load_point_dataset, load_point_table


COMMAND = Path(__file__).parents[1] / "examples" / "build_dataset.py"
SPLITS = {"train": "training", "test": "test"}


def cloud(seed: int, num_points: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_points, 3)).astype(np.float32)


def write(path: Path, content: str | bytes | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def off_box(size: tuple[float, float, float], header: str = "OFF\n") -> str:
    """A box of twelve triangles around the origin."""
    vertices = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
    lines = [" ".join(str(a * b / 2) for a, b in zip(v, size, strict=True)) for v in vertices]
    quads = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    faces = [f"3 {a} {b} {c}\n3 {a} {c} {d}" for a, b, c, d in quads]
    return f"{header}8 12 0\n" + "\n".join(lines + faces) + "\n"


def write_h5(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", compression_opts=4)
    return path


def build(source, output: Path, **kwargs) -> tuple[datasets.DatasetDict, object]:
    """The tables as anyone loads them, formatted to numpy, and the report."""
    report = build_dataset(source, output, **kwargs)
    return load(output), report


def load(output: Path) -> datasets.DatasetDict:
    files: dict[str, list[str]] = {}
    for path in sorted((output / "data").iterdir()):
        files.setdefault(path.name.partition("-")[0], []).append(str(path))
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(output.parent / "cache"))
    return loaded.with_format("numpy")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_clouds(rows: datasets.Dataset, expected: Iterable[np.ndarray]):
    for points, given in zip(rows["points"], expected, strict=True):
        np.testing.assert_allclose(points, normalize_unit_sphere(given.astype(np.float64)), atol=1e-6)


# ---- ModelNet


def modelnet_off(root: Path) -> Path:
    for i, name in enumerate(MODELNET40_CLASSES):
        # About half of the published files have their counts glued to the magic word.
        header = "OFF" if i % 2 else "OFF\n"
        write(root / name / "train" / f"{name}_0001.off", off_box((1, 2, 3 + i), header))
        write(root / name / "test" / f"{name}_0002.off", off_box((1, 1, 1 + i), header))
    return root


def modelnet_hdf5(root: Path) -> dict[str, np.ndarray]:
    """Two files for `train`, one for `test`; returns the clouds of each split."""
    write(root / "shape_names.txt", "\n".join(MODELNET40_CLASSES) + "\n")
    clouds = {"train": [], "test": []}
    for split, number, labels in (("train", 0, range(40)), ("train", 1, (8, 0, 35)), ("test", 0, (39, 8, 0))):
        name = f"ply_data_{split}{number}.h5"
        data = np.stack([cloud(len(clouds[split]) + i) for i in range(len(labels))])
        labels = np.array(labels, dtype=np.uint8)[:, None]
        write_h5(root / name, data=data, label=labels, normal=data, faceId=np.zeros(data.shape[:2], np.int32))
        clouds[split] += list(data)
        with (root / f"{split}_files.txt").open("a") as file:
            file.write(f"data/modelnet40_ply_hdf5_2048/{name}\n")
    return {split: np.stack(values) for split, values in clouds.items()}


def modelnet_resampled(root: Path) -> dict[str, np.ndarray]:
    names = {"modelnet40_train": [], "modelnet40_test": [], "modelnet10_train": [], "modelnet10_test": []}
    tables = {}
    for i, name in enumerate(MODELNET40_CLASSES):
        for split in ("train", "test"):
            shape = f"{name}_{1 + (split == 'test'):04d}"
            tables[shape] = np.hstack([cloud(i), np.ones((48, 3))])
            lines = [",".join(f"{value:.6f}" for value in row) for row in tables[shape]]
            write(root / name / f"{shape}.txt", "\n".join(lines) + "\n")
            names[f"modelnet40_{split}"].append(shape)
            if name in MODELNET10_CLASSES:
                names[f"modelnet10_{split}"].append(shape)
    write(root / "modelnet40_shape_names.txt", "\n".join(MODELNET40_CLASSES) + "\n")
    for listing, shapes in names.items():
        write(root / f"{listing}.txt", "\n".join(shapes[::-1]) + "\n")
    return tables


def test_modelnet_meshes_are_sampled_whether_or_not_the_header_is_glued(tmp_path):
    root = modelnet_off(tmp_path / "ModelNet40")
    rows, report = build(open_source("modelnet40", root), tmp_path / "out", num_points=600)
    assert report.num_rows == {"train": 40, "test": 40} and not report.unreadable
    assert rows["train"].features["label"].names == MODELNET40_CLASSES
    assert rows["test"]["label"][:].tolist() == list(range(40))
    assert rows["train"][1]["name"] == "bathtub/bathtub_0001"
    points = rows["train"]["points"][:]
    assert points.shape == (40, 600, 3) and points.dtype == np.float32
    np.testing.assert_allclose(points.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(points, axis=2).max(axis=1), 1, atol=1e-6)
    # A box of 1 x 2 x 3: the two ends along z have 4 / 22 of the surface.
    z = points[0][:, 2]
    ends = (np.abs(z - z.max()) < 1e-4) | (np.abs(z - z.min()) < 1e-4)
    assert ends.mean() == pytest.approx(4 / 22, abs=0.05)


def test_modelnet10_is_taken_out_of_every_form_of_modelnet40(tmp_path):
    modelnet_hdf5(tmp_path / "hdf5")
    for form, count in (("off", 10), ("hdf5", 12), ("resampled", 10)):
        root = tmp_path / form
        if form != "hdf5":
            (modelnet_off if form == "off" else modelnet_resampled)(root)
        source = open_source("modelnet10", root)
        assert list(source.class_names) == MODELNET10_CLASSES
        train = [item for item in source.items if item.split == "train"]
        assert len(train) == count
        assert {item.label for item in train} == set(range(10))
    source = open_source("modelnet10", tmp_path / "hdf5")
    # Row 1 of the second file is an airplane, which ModelNet10 has not; row 0 is a chair, row 2 a toilet.
    assert [(i.name, i.label) for i in source.items][10:12] == [("ply_data_train1/0", 2), ("ply_data_train1/2", 9)]


def test_modelnet_hdf5_keeps_rows_and_labels_of_files_listed_by_their_makers_paths(tmp_path):
    clouds = modelnet_hdf5(tmp_path / "modelnet40_ply_hdf5_2048")
    source = open_source("modelnet40", tmp_path / "modelnet40_ply_hdf5_2048")
    rows, _ = build(source, tmp_path / "out")
    assert rows["train"]["label"][:].tolist() == [*range(40), 8, 0, 35] and rows["test"]["label"][:].tolist() == [
        39,
        8,
        0,
    ]
    assert rows["train"].features["points"].shape == (48, 3)
    for split, expected in clouds.items():
        assert_same_clouds(rows[split], expected)


def test_modelnet_resampled_follows_the_lists_and_leaves_normals_out(tmp_path):
    tables = modelnet_resampled(tmp_path / "modelnet40_normal_resampled")
    source = open_source("modelnet40", tmp_path / "modelnet40_normal_resampled")
    rows, _ = build(source, tmp_path / "out")
    assert rows["train"][0]["name"] == "xbox/xbox_0001"  # the order of the list
    names = [name.partition("/")[2] for name in rows["test"]["name"]]
    assert_same_clouds(rows["test"], [tables[name][:, :3] for name in names])
    classes = rows["test"].features["label"].int2str(rows["test"]["label"][:].tolist())
    assert classes == [name.rpartition("_")[0] for name in names] and "night_stand" in classes


def test_another_order_of_classes_is_refused(tmp_path):
    modelnet_hdf5(tmp_path)
    write(tmp_path / "shape_names.txt", "\n".join(["bathtub", "airplane", *MODELNET40_CLASSES[2:]]))
    with pytest.raises(ValueError, match="'bathtub' in line 1, expected 'airplane'"):
        open_source("modelnet40", tmp_path)


def test_torn_meshes_are_reported_and_the_rest_is_written(tmp_path):
    root = modelnet_off(tmp_path / "ModelNet40")
    whole = off_box((1, 2, 3))
    torn = {
        "airplane": whole[: whole.index("3 0 1 3")],
        "bed": whole[: whole.rindex("3 1")],
        "bench": whole.replace("8 12 0", "9 12 0"),
        "car": "",
        "chair": "\0" * 100,
        "cup": whole.replace("3 0 1 3", "3 0 1 99"),
        "desk": whole[:-2],
    }
    for name, text in torn.items():
        write(root / name / "train" / f"{name}_0001.off", text)
    rows, report = build(open_source("modelnet40", root), tmp_path / "out", num_points=16)
    assert sorted(report.unreadable) == [f"{name}/{name}_0001" for name in sorted(torn)]
    assert report.num_rows == {"train": 33, "test": 40} == rows.num_rows
    assert "promises 8 vertices and 12 faces" in report.unreadable["bed/bed_0001"]
    assert "a face of 3 corners has 2" in report.unreadable["desk/desk_0001"]
    assert all(reason and str(tmp_path) not in reason for reason in report.unreadable.values())
    assert all(name in str(report) for name in report.unreadable)


# ---- ScanObjectNN


def scanobjectnn(root: Path, with_mask: bool = True) -> dict[str, np.ndarray]:
    """The files of the three splits; returns the training clouds of each."""
    clouds = {}
    for seed, (variant, folder, ending) in enumerate(
        [
            ("obj-bg", "main_split", ""),
            ("obj-only", "main_split_nobg", ""),
            ("pb-t50-rs", "main_split", "_augmentedrot_scale75"),
        ]
    ):
        for split, prefix in SPLITS.items():
            data = np.stack([cloud(100 * seed + i) for i in range(15 if split == "train" else 4)])
            mask = np.where(data[:, :, 0] > 0, -1, np.arange(len(data))[:, None]).astype(np.int32)
            arrays = {"data": data, "label": np.arange(len(data), dtype=np.int32)[::-1]}
            arrays |= {"mask": mask} if with_mask else {}
            write_h5(root / folder / f"{prefix}_objectdataset{ending}.h5", **arrays)
            if split == "train":
                clouds[variant] = data
    return clouds


@pytest.mark.parametrize("variant", ["obj-bg", "obj-only", "pb-t50-rs"])
def test_scanobjectnn_reads_the_files_of_each_split_with_its_background(tmp_path, variant):
    clouds = scanobjectnn(tmp_path / "h5_files")
    rows, report = build(open_source(f"scanobjectnn-{variant}", tmp_path), tmp_path / "out")
    assert report.num_rows == {"train": 15, "test": 4}
    assert rows["train"].features["label"].names == SCANOBJECTNN_CLASSES and rows["train"][0]["label"] == 14
    assert rows["train"].features["part_labels"].feature.names == ["background", "object"]
    assert_same_clouds(rows["train"], clouds[variant])
    np.testing.assert_array_equal(rows["train"]["part_labels"][:], clouds[variant][:, :, 0] <= 0)
    assert "15 shapes of the official" in str(report)


def test_scanobjectnn_without_masks_has_no_part_labels(tmp_path):
    scanobjectnn(tmp_path, with_mask=False)
    rows, _ = build(open_source("scanobjectnn-obj-only", tmp_path), tmp_path / "out")
    assert rows["train"].column_names == ["points", "label", "name"]


# ---- ShapeNet


def test_shapenet55_labels_follow_the_numbers_of_the_classes(tmp_path):
    root = tmp_path / "ShapeNet55-34"
    names = [f"{synset}-1a04e3eab45ca15dd86060f189eb{i:03d}.npy" for i, synset in enumerate(SHAPENET55_CLASSES)]
    for i, name in enumerate(names):
        write(root / "shapenet_pc" / name, cloud(i, 64))
    write(root / "ShapeNet-55" / "train.txt", "\n".join(names[::-1]) + "\n")
    lost = "02691156-lost.npy"
    write(root / "ShapeNet-55" / "test.txt", f"{names[3].replace('02801938', '02958343')}\n{lost}\n")
    write(root / "shapenet_pc" / names[3].replace("02801938", "02958343"), cloud(3, 64))
    rows, report = build(open_source("shapenet55", root), tmp_path / "out")
    labels = rows["train"].features["label"]
    assert labels.num_classes == 55 and labels.names[:2] == ["airplane", "trash bin"] and labels.names[-1] == "washer"
    assert rows["train"]["label"][:].tolist() == list(range(55))[::-1]
    assert labels.int2str(int(rows["test"][0]["label"])) == "car"
    assert_same_clouds(rows["train"], [cloud(i, 64) for i in range(55)][::-1])
    assert report.unreadable == {"02691156-lost": "there is no such file"}


def shapenetpart(root: Path, form: str) -> Path:
    """Three shapes of each class, one in each split, with the same clouds and parts in both forms."""
    table = {short: [] for short in ("train", "val", "test")}
    for label, (name, (synset, count)) in enumerate(SHAPENETPART_CLASSES.items()):
        for i, shapes in enumerate(table.values()):
            parts = PART_BOUNDS[label] + np.arange(40) % count
            shapes.append(
                (name, synset, f"1a04e3eab45ca15dd86060f189eb{label:02d}{i}", cloud(3 * label + i, 40), parts)
            )
    categories = "".join(f"{name}\t{synset}\n" for name, (synset, _) in SHAPENETPART_CLASSES.items())
    if form == "hdf5":
        write(root / "hdf5_data" / "all_object_categories.txt", categories)
        for short, shapes in table.items():
            write(root / "hdf5_data" / f"{short}_hdf5_file_list.txt", f"ply_data_{short}0.h5\n")
            write_h5(
                root / "hdf5_data" / f"ply_data_{short}0.h5",
                data=np.stack([points for *_, points, _ in shapes]),
                label=np.arange(16, dtype=np.uint8)[:, None],
                pid=np.stack([parts for *_, parts in shapes]).astype(np.uint8),
            )
        return root
    write(root / "synsetoffset2category.txt", categories)
    for short, shapes in table.items():
        entries = [f"shape_data/{synset}/{model}" for _, synset, model, *_ in shapes]
        write(root / "train_test_split" / f"shuffled_{short}_file_list.json", json.dumps(entries))
        for _, synset, model, points, parts in shapes:
            rows = np.hstack([points, np.ones((40, 3)), parts[:, None]])
            lines = [" ".join(f"{value:.6f}" for value in row) for row in rows]
            write(root / synset / f"{model}.txt", "\n".join(lines) + "\n")
    return root


def test_both_forms_of_shapenetpart_make_the_same_tables(tmp_path):
    tables = {}
    for form in ("text", "hdf5"):
        source = open_source("shapenetpart", shapenetpart(tmp_path / form, form))
        tables[form], report = build(source, tmp_path / form / "out")
        assert report.num_rows == {"train": 16, "validation": 16, "test": 16} and not report.unreadable
    for split, rows in tables["text"].items():
        other = tables["hdf5"][split]
        assert rows.features["label"].names == list(SHAPENETPART_CLASSES)
        assert rows["label"][:].tolist() == other["label"][:].tolist() == list(range(16))
        assert rows.features["part_labels"].feature.num_classes == 50
        for i in range(16):
            np.testing.assert_allclose(rows[i]["points"], other[i]["points"], atol=1e-5)
            np.testing.assert_array_equal(rows[i]["part_labels"], other[i]["part_labels"])
    parts = tables["text"]["train"].features["part_labels"].feature
    assert parts.int2str([0, 3, 4, 47, 49]) == ["Airplane 0", "Airplane 3", "Bag 0", "Table 0", "Table 2"]


def read_two_halves(item, num_points, seed):
    """A cloud whose parts are told by the sign of x."""
    points = cloud(item.label, 40)
    points[:, 0] += np.where(points[:, 0] > 0, 10, -10)
    return points, (points[:, 0] > 0).astype(np.uint8)


def test_parts_stay_with_their_points_when_a_cloud_is_thinned_or_filled_up(tmp_path):
    items = [ShapeItem(f"shape {i}", "train", i, tmp_path) for i in range(3)]
    source = ShapeSource("halves", "Halves", "Two halves.", items, list("abc"), read_two_halves, ["left", "right"])
    for num_points in (24, 40, 100):
        rows, _ = build(source, tmp_path / str(num_points), num_points=num_points)
        points, parts = rows["train"]["points"][:], rows["train"]["part_labels"][:]
        assert points.shape == (3, num_points, 3)
        np.testing.assert_array_equal(parts, points[:, :, 0] > points[:, :, 0].mean(axis=1, keepdims=True))
        assert 0 < parts.mean() < 1


def test_a_part_of_another_class_and_a_table_of_other_width_are_reported(tmp_path):
    root = shapenetpart(tmp_path / "text", "text")
    bags = sorted((root / "02773838").iterdir())
    write(bags[0], bags[0].read_text().replace(" 4.000000\n", " 12.000000\n"))
    write(bags[1], "1 2 3\n4 5 6\n")
    _, report = build(open_source("shapenetpart", root), tmp_path / "out")
    assert list(report.unreadable.values()) == [
        "has part 12, but those of Bag are 4 to 5",
        "the file holds a table of shape (2, 3), expected (n, 7)",
    ]


# ---- Folders


def mixed_folder(root: Path, count: int = 12) -> Path:
    for split in ("train", "test"):
        for i in range(count):
            write(root / split / f"class {i % 3}" / f"shape{i}.npy", cloud(i, 30 + i))
    write(root / "train" / "class 1" / "mesh.off", off_box((1, 2, 3)))
    lines = [" ".join(map(str, row)) for row in cloud(77).tolist()]
    write(root / "train" / "class 2" / "text.xyz", "\n".join(lines))
    write(root / "train" / "class 2" / "notes.md", "no shape")
    write(root / "train" / "class 2" / ".hidden.npy", "no shape")
    return root


def test_a_folder_of_meshes_and_clouds_of_any_size_becomes_a_table(tmp_path):
    source = open_folder(mixed_folder(tmp_path / "shapes"), license="mit")
    rows, report = build(source, tmp_path / "out")
    assert report.num_rows == {"train": 14, "test": 12} and report.ignored == {".md": 1}
    assert rows["train"].features["label"].names == ["class 0", "class 1", "class 2"]
    by_name = {row["name"]: row for row in rows["train"]}
    assert by_name["train/class 1/mesh"]["points"].shape == (2048, 3)
    assert by_name["train/class 2/shape5"]["points"].shape == (35, 3)
    expected = normalize_unit_sphere(cloud(77).astype(float))
    np.testing.assert_allclose(by_name["train/class 2/text"]["points"], expected, atol=1e-6)


def test_the_written_folder_loads_with_plain_load_dataset_and_our_loaders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = mixed_folder(tmp_path / "shapes")
    tables = []
    for number in range(2):  # `datasets` caches a folder with a card by its name and its card alone
        output = tmp_path / str(number) / "out"
        report = build_dataset(open_folder(root), output, rows_per_shard=4, dtype="float16", seed=number)
        write_card(open_folder(root), report, output, "python examples/build_dataset.py folder")
        loaded = datasets.load_dataset(str(output))
        assert loaded.num_rows == {"train": 14, "test": 12}
        assert loaded["train"].features["points"].dtype == "float16"
        clouds = load_point_clouds(loaded["train"])
        assert len(clouds) == 14 and clouds.values.dtype == np.float16
        table = load_point_table(str(output), "train", num_points=32)
        assert table.points.shape == (14, 32, 3) and table.class_names == ["class 0", "class 1", "class 2"]
        assert len(list(load_point_dataset(str(output), "test", streaming=True))) == 12
        tables.append(table.points)
    assert (tables[0] != tables[1]).any()  # the mesh is sampled by the seed


def test_the_card_counts_the_tables_and_names_what_was_left_out(tmp_path):
    root = mixed_folder(tmp_path / "shapes")
    write(root / "train" / "class 0" / "shape0.npy", b"torn")
    source = open_folder(root, license="mit")
    report = build_dataset(source, tmp_path / "out")
    write_card(source, report, tmp_path / "out", "the command")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    header = card.split("---\n")[1]
    assert "license: mit\n" in header and "- n<1K\n" in header and "path: data/test-*.parquet" in header
    for row in ("| class | train | test |", "| class 0 | 3 | 4 |", "| class 1 | 5 | 4 |", "| **all** | 13 | 12 |"):
        assert row in card
    assert "25 point clouds in 3 classes" in card and "the command" in card
    assert "could not be read: 1." in card and "`train/class 0/shape0`" in card
    picture = (tmp_path / "out" / "contact_sheet.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 5_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"\x93NUMPY torn", "cannot be read"),
        (np.full((5, 3), np.nan), "15 coordinates that are NaN"),
        (np.ones((5, 3)), "all its 5 points in one place"),
        (np.ones((5, 2)), "has shape (5, 2)"),
        (np.zeros((0, 3)), "has shape (0, 3)"),
        (np.eye(3) * 1e300, "reaches to 1e+300, which is too far or too near to be normalised"),
        (np.eye(3) * 1e-300, "reaches to 1e-300"),
        (np.array([{"an": "object"}], dtype=object), "allow_pickle=False"),
    ],
)
def test_clouds_that_no_model_could_take_are_reported(tmp_path, content, reason):
    root = mixed_folder(tmp_path / "shapes", count=3)
    write(root / "train" / "class 0" / "bad.npy", content)
    _, report = build(open_folder(root), tmp_path / "out")
    assert list(report.unreadable) == ["train/class 0/bad"] and reason in report.unreadable["train/class 0/bad"]
    assert report.num_rows == {"train": 5, "test": 3}


def test_layouts_that_no_builder_knows_are_errors_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("modelnet40", "scanobjectnn-obj-bg", "shapenet55", "shapenetpart", "folder"):
        with pytest.raises(FileNotFoundError):
            open_source(name, tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match="`source`"):
            open_source(name, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`name` is 'shapenet', expected one of modelnet40"):
        open_source("shapenet", tmp_path)
    write(tmp_path / "odd" / "a split" / "class" / "a.npy", cloud(0))
    with pytest.raises(ValueError, match="split 'a split'"):
        open_source("folder", tmp_path / "odd")
    for suffix in ("npy", "xyz"):
        write(tmp_path / "twice" / "train" / "class" / f"a.{suffix}", cloud(0).tobytes())
    with pytest.raises(ValueError, match="the first one 'train/class/a' as a.npy, a.xyz; suffixes do not"):
        open_source("folder", tmp_path / "twice")
    write(tmp_path / "torn" / "train" / "class" / "a.npy", b"torn")
    with pytest.raises(ValueError, match="no shape of split 'train' can be read; train/class/a: the file cannot"):
        build_dataset(open_source("folder", tmp_path / "torn"), tmp_path / "out")


def test_names_of_classes_and_parts_are_no_formulas_in_the_contact_sheet(tmp_path):
    shapes = {"price $x_{$ y": [(normalize_unit_sphere(cloud(0)), np.arange(48) % 2)]}
    draw_contact_sheet(shapes, tmp_path / "sheet.png", ["$x_{$", "right"])
    assert (tmp_path / "sheet.png").stat().st_size > 1_000


def test_files_out_of_place_are_counted_and_links_to_nowhere_reported(tmp_path):
    root = mixed_folder(tmp_path / "shapes", count=3)
    for name in ("high.npy", "train/high.npy", "train/class 0/deeper/deep.off", "README.md"):
        write(root / name, "out of place")
    (root / "train" / "class 0" / "lost.npy").symlink_to(tmp_path / "nowhere.npy")
    source = open_folder(root)
    outside = "outside `<split>/<class>/`"
    assert source.ignored == {".md": 2, f".npy {outside}": 2, f".off {outside}": 1}
    _, report = build(source, tmp_path / "out")
    assert report.unreadable == {"train/class 0/lost": "there is no such file"}
    assert f"2 .npy {outside}" in str(report)


def test_classes_that_differ_in_case_alone_are_named(tmp_path, caplog):
    for name in ("Chair", "chair", "table"):
        write(tmp_path / "train" / name / "a.npy", cloud(1))
    assert open_folder(tmp_path).class_names == ["Chair", "chair", "table"]
    assert "['Chair', 'chair'], which differ in case alone" in caplog.text


@pytest.mark.parametrize("broken", ["missing", "torn"])
def test_one_broken_hdf5_file_of_several_is_left_out_and_reported(tmp_path, broken):
    def spoil(path: Path):
        path.unlink() if broken == "missing" else path.write_bytes(path.read_bytes()[:-100])

    modelnet_hdf5(tmp_path / "modelnet")
    spoil(tmp_path / "modelnet" / "ply_data_train1.h5")
    part = shapenetpart(tmp_path / "part", "hdf5") / "hdf5_data"
    write(part / "train_hdf5_file_list.txt", "ply_data_train0.h5\nply_data_train1.h5\n")
    write(part / "ply_data_train1.h5", (part / "ply_data_train0.h5").read_bytes())
    spoil(part / "ply_data_train1.h5")
    for name, folder, rows in (("modelnet40", "modelnet", 40), ("shapenetpart", "part", 16)):
        source = open_source(name, tmp_path / folder)
        report = build_dataset(source, tmp_path / f"{folder}-out")
        assert report.num_rows["train"] == rows and list(report.unreadable) == ["ply_data_train1.h5"]
        reason = report.unreadable["ply_data_train1.h5"]
        assert ("no such file" if broken == "missing" else "cannot be read as HDF5") in reason
        assert str(tmp_path) not in reason and reason in str(report)
    spoil(tmp_path / "modelnet" / "ply_data_test0.h5")
    with pytest.raises(OSError, match=r"no file that .*test_files\.txt names can be read; ply_data_test0\.h5: "):
        open_source("modelnet40", tmp_path / "modelnet")


def test_a_split_without_shapes_is_an_error(tmp_path):
    modelnet_hdf5(tmp_path / "modelnet")
    data, airplane = np.stack([cloud(0)]), np.array([[0]], dtype=np.uint8)
    write_h5(tmp_path / "modelnet" / "ply_data_test0.h5", data=data, label=airplane)
    with pytest.raises(ValueError, match="has no shape of the 10 classes of ModelNet10 for 'test'"):
        open_source("modelnet10", tmp_path / "modelnet")
    root = shapenetpart(tmp_path / "part", "text")
    for content, message in (("[]", "is no list of names, or an empty one"), ('["a', "cannot be read as JSON: ")):
        write(root / "train_test_split" / "shuffled_val_file_list.json", content)
        with pytest.raises(ValueError, match=f"shuffled_val_file_list.json {message}"):
            open_source("shapenetpart", root)


# ---- Files that are not to be trusted


@pytest.mark.parametrize("entry", ["../../secret", "/etc/passwd", "..", "a/b", "a\\b", "", " ", "a\0b"])
def test_lists_cannot_name_files_outside_their_folder(entry):
    with pytest.raises(ValueError, match="expected the bare name of a file"):
        plain_name(entry, "list.txt")


def test_a_list_that_leads_outside_is_refused(tmp_path):
    write(tmp_path / "ShapeNet-55" / "train.txt", "02691156-/../../../etc/passwd.npy\n")
    with pytest.raises(ValueError, match=r"train\.txt names '02691156-/"):
        open_source("shapenet55", tmp_path)
    root = shapenetpart(tmp_path / "part", "text")
    listing = root / "train_test_split" / "shuffled_train_file_list.json"
    for entry in ("shape_data/02691156/..", "shape_data/../x", "/etc/passwd"):
        write(listing, json.dumps([entry]))
        with pytest.raises(ValueError, match="shuffled_train_file_list"):
            open_source("shapenetpart", root)
    modelnet_hdf5(tmp_path / "hdf5")
    write(tmp_path / "hdf5" / "train_files.txt", "/elsewhere/ply_data_train0.h5\n../../ply_data_train1.h5\n")
    source = open_source("modelnet40", tmp_path / "hdf5")
    assert {item.path.parent for item in source.items} == {tmp_path / "hdf5"}


def test_hdf5_arrays_that_are_objects_elsewhere_or_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "main_split" / "training_objectdataset.h5"
    test = tmp_path / "main_split" / "test_objectdataset.h5"
    data, labels = np.stack([cloud(0), cloud(1)]), np.array([0, 1])
    write_h5(test, data=data, label=labels)
    elsewhere = write_h5(tmp_path / "secret.h5", data=data)
    data.tofile(tmp_path / "secret.raw")

    def refuses(match: str):
        with pytest.raises(ValueError, match=match):
            open_source("scanobjectnn-obj-bg", tmp_path)

    write(path, b"no HDF5")
    with pytest.raises(OSError, match="training_objectdataset.h5 cannot be read as HDF5"):
        open_source("scanobjectnn-obj-bg", tmp_path)
    write_h5(path, points=data, label=labels)
    refuses(r"has the arrays \['label', 'points'\], but no `data`")
    write_h5(path, data=data[:, :, :2], label=labels)
    refuses(r"shape \(2, 48, 2\), expected \(rows, points, 3\)")
    write_h5(path, data=data, label=labels[:1])
    refuses("1 labels for 2 clouds")
    write_h5(path, data=data, label=np.array([0, 15]))
    refuses("label 15 in row 1, expected 0 to 14")
    write_h5(path, data=data, label=labels, mask=np.zeros((2, 3)))
    write_h5(test, data=data, label=labels, mask=np.zeros((2, 48)))
    refuses(r"`mask` of shape \(2, 3\), expected \(2, 48\)")
    write_h5(path, data=np.array([b"pickled", b"things"], dtype=object), label=labels)
    refuses("of type object, expected numbers")
    for kind in ("link", "external", "virtual"):
        with h5py.File(path, "w") as file:
            file["label"] = labels
            if kind == "link":
                file["data"] = h5py.ExternalLink(str(elsewhere), "data")
            elif kind == "external":
                file.create_dataset(
                    "data", data.shape, "f4", external=[(str(tmp_path / "secret.raw"), 0, data.nbytes)]
                )
            else:
                layout = h5py.VirtualLayout(data.shape, "f4")
                layout[:] = h5py.VirtualSource(str(elsewhere), "data", data.shape)
                file.create_virtual_dataset("data", layout)
        refuses("points elsewhere, which is not followed")


def test_without_h5py_the_error_names_the_extra(tmp_path, monkeypatch):
    modelnet_hdf5(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "jointmae-hf\[io\]"'):
        open_source("modelnet40", tmp_path)


# ---- Resuming


def slow_read(item, num_points, seed):
    time.sleep(0.02)
    return read_shape_file(item, num_points, seed)


def test_workers_and_other_shapes_change_nothing(tmp_path):
    root = mixed_folder(tmp_path / "shapes")
    one, _ = build(open_folder(root), tmp_path / "one", num_points=20)
    build_dataset(open_folder(root), tmp_path / "two", num_points=20, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (root / "train" / "class 0" / "shape0.npy").unlink()
    fewer, _ = build(open_folder(root), tmp_path / "fewer", num_points=20)
    before = {row["name"]: row["points"] for row in one["train"]}
    for row in fewer["train"]:
        np.testing.assert_array_equal(row["points"], before[row["name"]])
    other, _ = build(open_folder(root), tmp_path / "other", num_points=20, seed=1)
    mesh = other["train"]["name"].index("train/class 1/mesh")
    assert (other["train"][mesh]["points"] != before["train/class 1/mesh"]).any()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_build_resumes_to_the_same_bytes(tmp_path, num_workers):
    root = mixed_folder(tmp_path / "shapes", count=15)
    write(root / "train" / "class 0" / "bad.npy", b"torn")
    source = open_folder(root)
    arguments = {"num_points": 16, "rows_per_shard": 4}
    build_dataset(source, tmp_path / "whole", **arguments)

    output = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(
        target=build_dataset,
        args=(replace(source, read=slow_read), output),
        kwargs=arguments | {"num_workers": num_workers},
    )
    process.start()
    deadline = time.monotonic() + 20
    while len(list((output / "data").glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = sorted((output / "data").glob("*.parquet"))
    state = json.loads((output / "build.json").read_text())
    assert 1 <= len(state["shards"]) <= len(done) < len(list((tmp_path / "whole" / "data").iterdir()))
    whole = [output / "data" / name for name, shard in state["shards"].items() if not shard["unreadable"]]
    times = [path.stat().st_mtime_ns for path in whole]

    report = build_dataset(source, output, num_workers=num_workers, **arguments)
    assert contents(output) == contents(tmp_path / "whole")
    assert list(report.unreadable) == ["train/class 0/bad"]
    assert [path.stat().st_mtime_ns for path in whole] == times


def test_a_finished_build_is_not_done_again_but_a_repaired_file_finds_its_place(tmp_path):
    root = mixed_folder(tmp_path / "shapes")
    good = (root / "train" / "class 0" / "shape3.npy").read_bytes()
    build_dataset(open_folder(root), tmp_path / "whole", rows_per_shard=4)
    write(root / "train" / "class 0" / "shape3.npy", b"torn")
    report = build_dataset(open_folder(root), tmp_path / "out", rows_per_shard=4)
    assert report.num_rows["train"] == 13
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    write(root / "train" / "class 0" / "shape3.npy", good)
    report = build_dataset(open_folder(root), tmp_path / "out", rows_per_shard=4)
    assert report.num_rows["train"] == 14 and not report.unreadable
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    assert [name for name in times if times[name] != again[name]] == ["train-00000-of-00004.parquet"]


def test_a_folder_that_holds_another_build_is_left_alone(tmp_path):
    root = mixed_folder(tmp_path / "shapes", count=3)
    build_dataset(open_folder(root), tmp_path / "out", num_points=16)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="num_points 16, not 32; name a new folder"):
        build_dataset(open_folder(root), tmp_path / "out", num_points=32)
    write(root / "train" / "class 0" / "new.npy", cloud(5))
    with pytest.raises(ValueError, match="`output` is .*holds a build with items"):
        build_dataset(open_folder(root), tmp_path / "out", num_points=16)
    write(tmp_path / "foreign" / "data" / "train.csv", "x")
    with pytest.raises(ValueError, match="data of another origin"):
        build_dataset(open_folder(root), tmp_path / "foreign")
    write(tmp_path / "mine" / "README.md", "precious")
    with pytest.raises(ValueError, match="README.md of another origin"):
        build_dataset(open_folder(root), tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["README.md"]
    assert contents(tmp_path / "out") == before
    for argument in ({"num_points": 0}, {"dtype": "int8"}, {"num_workers": 0}, {"rows_per_shard": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(argument))}` is"):
            build_dataset(open_folder(root), tmp_path / "new", **argument)


def test_a_build_killed_at_its_first_shard_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    source, save_state = open_folder(mixed_folder(tmp_path / "shapes", count=3)), core._save_state
    build_dataset(source, tmp_path / "whole", num_points=16)

    # Before anything was finished: there is nothing yet that another build would spoil.
    write(tmp_path / "out" / "data" / ".train-00000-of-00007.parquet.partial", b"half")
    monkeypatch.setattr(core, "_save_state", lambda *state: [save_state(*state), sys.exit("killed")])
    with pytest.raises(SystemExit):
        build_dataset(source, tmp_path / "out", num_points=8, rows_per_shard=1)
    # Between the first shard and its entry.
    monkeypatch.setattr(core, "_save_state", lambda *state: sys.exit("killed") if state[2] else save_state(*state))
    with pytest.raises(SystemExit):
        build_dataset(source, tmp_path / "out", num_points=16)
    assert len(list((tmp_path / "out" / "data").glob("*.parquet"))) == 1
    monkeypatch.undo()
    build_dataset(source, tmp_path / "out", num_points=16)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- Command


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("modelnet40", "max_shapes", "5", "kicad"),
        ("folder", "min_per_class", "20", "kicad"),
        ("shapenet55", "doc", "there", "kicad"),
        ("modelnet40", "license", "mit", "folder"),
        ("kicad", "license", "mit", "folder"),
        ("kicad", "dtype", "float32", "all but kicad"),
        ("kicad", "rows_per_shard", "1024", "all but kicad"),
    ],
)
def test_an_option_that_a_builder_does_not_take_is_refused(monkeypatch, capsys, name, option, value, expected):
    monkeypatch.setattr(sys, "argv", ["build", name, "--source", ".", "--output", "out", f"--{option}", value])
    with pytest.raises(SystemExit):
        runpy.run_path(str(COMMAND))["parse_args"]()
    assert f"`--{option}` is {value}, but `name` is {name}, expected {expected}." in capsys.readouterr().err


def test_the_command_builds_a_folder_with_its_options(tmp_path, monkeypatch):
    root = mixed_folder(tmp_path / "shapes", count=3)
    options = ["--license", "mit", "--dtype", "float16"]
    monkeypatch.setattr(sys, "argv", ["build", "folder", f"--source={root}", f"--output={tmp_path / 'out'}", *options])
    runpy.run_path(str(COMMAND), run_name="__main__")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "license: mit\n" in card
    assert "folder --source shapes --output out --dtype float16 --license mit\n" in card


def test_kicad_parts_are_not_written_over_another_data_set(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(output / "README.md", "# Shapes of somebody")
    monkeypatch.setattr(sys, "argv", ["build", "kicad", f"--source={tmp_path}", f"--output={output}"])
    with pytest.raises(ValueError, match="`output` is .* which holds data of another origin"):
        runpy.run_path(str(COMMAND), run_name="__main__")
    assert [path.name for path in output.iterdir()] == ["README.md"]


# ---- Hub


def client_push(*folders: str) -> int:
    import datasets

    from jointmae_hf.data.builders import push_to_hub

    for folder in folders:
        push_to_hub(folder, "org/shapes")
    return datasets.load_dataset("org/shapes")["train"].num_rows


def test_a_pushed_folder_is_private_loads_by_its_name_and_replaces_older_tables(tmp_path):
    source = open_folder(mixed_folder(tmp_path / "shapes", count=3))
    report = build_dataset(source, tmp_path / "out")
    write_card(source, report, tmp_path / "out", "the command")
    build_dataset(source, tmp_path / "older", rows_per_shard=2)
    write(tmp_path / "out" / "data" / ".train-00000-of-00001.parquet.partial", b"half")
    folders = [str(tmp_path / name) for name in ("older", "out")]
    with HubServer() as hub:
        assert hub.call(client_push, tmp_path, *folders) == report.num_rows["train"]
        files = hub.files("org/shapes", kind="datasets")
        assert hub.repository("org/shapes", kind="datasets").private
    assert {name for name in files if not name.startswith(".git")} == {
        "README.md",
        "build.json",
        "contact_sheet.png",
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }
