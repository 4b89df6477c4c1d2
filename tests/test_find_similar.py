"""`examples/find_similar.py`: what it finds, keeps and refuses."""

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jointmae_hf import JointMAEConfig, JointMAEModel, JointMAEPointCloudProcessor


SCRIPT = Path(__file__).parents[1] / "examples" / "find_similar.py"
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_points": 96,
    "num_centers": [32, 16],
    "num_neighbors": [8, 4],
    "point_embed_sizes": [16, 32],
    "image_size": 32,
    "patch_strides": [4, 2],
    "image_embed_sizes": [16, 32],
}


def save_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = JointMAEConfig(**TINY)
    JointMAEModel(config).save_pretrained(folder)
    JointMAEPointCloudProcessor.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def shapes(tmp_path) -> Path:
    """Rods and discs; the last file is no cloud."""
    folder = tmp_path / "shapes"
    generator = np.random.default_rng(0)
    for kind, extent in (("rod", [1, 0.05, 0.05]), ("disc", [1, 1, 0.05])):
        (folder / kind).mkdir(parents=True)
        for number in range(3):
            np.save(folder / kind / f"{number}.npy", generator.uniform(-1, 1, (200, 3)) * extent)
    (folder / ".hidden").mkdir()
    np.save(folder / ".hidden" / "rod.npy", np.load(folder / "rod" / "0.npy"))
    (folder / "broken.xyz").write_text("not a cloud\n")
    (folder / "readme.md").write_text("no shape")
    return folder


@pytest.fixture
def find(model, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def run(*arguments, model: Path = model) -> tuple[list[tuple[float, str]], str]:
        monkeypatch.setattr(sys, "argv", ["find_similar.py", *map(str, arguments), "--model", str(model)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        output = capsys.readouterr()
        rows = [line.split(maxsplit=1) for line in output.out.splitlines()]
        return [(float(value), name) for value, name in rows], output.err

    return run


def test_the_most_similar_shapes_come_first_and_what_cannot_be_read_is_named(find, shapes):
    found, errors = find(shapes / "rod" / "1.npy", shapes)
    values, names = zip(*found, strict=True)
    assert set(names[:2]) == {str(shapes / "rod" / name) for name in ("0.npy", "2.npy")}  # without the query
    assert {Path(name).parent.name for name in names[2:]} == {"disc"} and len(names) == 5
    assert list(values) == sorted(values, reverse=True) and max(values) <= 1
    assert "broken.xyz" in errors and "hidden" not in errors and "readme" not in errors
    assert find(shapes / "rod" / "1.npy", shapes, "--top", 2)[0] == found[:2]


def test_a_shape_of_other_size_and_place_is_the_same(find, shapes, tmp_path):
    np.save(tmp_path / "query.npy", 1000 * np.load(shapes / "disc" / "2.npy") + 5)
    value, name = find(tmp_path / "query.npy", shapes)[0][0]
    assert (value, name) == (1.0, str(shapes / "disc" / "2.npy"))


def test_an_index_is_read_again_only_for_files_that_changed(find, shapes, tmp_path, monkeypatch):
    index = tmp_path / "kept" / "index.safetensors"
    first, _ = find(shapes / "rod" / "1.npy", shapes, "--index", index)
    np.save(shapes / "disc" / "0.npy", np.load(shapes / "rod" / "0.npy"))
    os.utime(shapes / "disc" / "0.npy", ns=(1, 1))
    (shapes / "disc" / "1.npy").unlink()
    original, read = JointMAEPointCloudProcessor.__call__, []

    def watch(self, path, **options):
        read.append(path.name if path.parent.name != "disc" else f"disc {path.name}")
        return original(self, path, **options)

    monkeypatch.setattr(JointMAEPointCloudProcessor, "__call__", watch)
    second, _ = find(shapes / "rod" / "1.npy", shapes, "--index", index)
    assert read == ["1.npy", "broken.xyz", "disc 0.npy"]  # the query, what failed, what changed
    assert [name for _, name in second] != [name for _, name in first]
    assert second == find(shapes / "rod" / "1.npy", shapes)[0]


def test_what_was_read_before_a_stop_is_kept(find, shapes, tmp_path, monkeypatch):
    query, index = shapes / "rod" / "1.npy", tmp_path / "index.safetensors"
    original, read = JointMAEPointCloudProcessor.__call__, []

    def stop_at_the_fourth(self, path, **options):
        read.append(path)
        if len(read) == 4:
            raise KeyboardInterrupt
        return original(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(JointMAEPointCloudProcessor, "__call__", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            find(query, shapes, "--index", index, "--batch_size", 1)
    files = json.loads(bytes(load_file(index)["files"].tolist()))
    assert [Path(name).name for name, _ in files] == ["0.npy"]  # the query and what is broken are no part of it
    assert find(query, shapes, "--index", index)[0] == find(query, shapes)[0]


def test_a_picture_is_drawn_whatever_files_are_called(find, shapes, tmp_path):
    pytest.importorskip("matplotlib")
    (shapes / "rod" / "0.npy").rename(shapes / "rod" / "a$_b$_$^.npy")
    (shapes / "rod" / "2.npy").rename(shapes / "rod" / os.fsdecode(b"Geh\xe4use.npy"))
    picture = tmp_path / "new" / "similar.png"
    found, _ = find(shapes / "rod" / "1.npy", shapes, "--picture", picture)
    assert len(found) == 5 and picture.read_bytes().startswith(b"\x89PNG")


def test_folders_that_are_links_are_entered_once(find, shapes, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "shapes").symlink_to(shapes)
    (shapes / "rod" / "back").symlink_to(tmp_path / "links")
    found, _ = find(shapes / "rod" / "1.npy", tmp_path / "links")
    assert len(found) == 5


@pytest.mark.parametrize(
    ("query", "folder", "message"),
    [
        ("rod/0.npy", "none", "none is no folder"),
        ("rod/0.npy", "empty", "empty holds no file with one of the suffixes"),
        ("rod/0.npy", "alone", "holds no shape beside the query"),
        ("none.npy", ".", "none.npy"),
        ("broken.xyz", ".", "broken.xyz"),
    ],
)
def test_errors_name_what_is_wrong(find, shapes, capsys, query, folder, message):
    (shapes / "empty").mkdir()
    (shapes / "alone").mkdir()
    (shapes / "alone" / "broken.xyz").write_text("no cloud either")
    with pytest.raises(SystemExit):
        find(shapes / query, shapes / folder)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--index", "broken.xyz/index", "broken.xyz"),
        ("--index", "rod", "rod is a folder, expected a file"),
        ("--picture", "similar.what", "has the suffix '.what', expected one of"),
    ],
)
def test_what_cannot_be_written_is_known_before_any_file_is_read(find, shapes, capsys, option, name, message):
    if option == "--picture":
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        find(shapes / "rod" / "0.npy", shapes, option, shapes / name)
    errors = capsys.readouterr().err
    assert message in errors and "passed over" not in errors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights", "is no index of this program"),
        ("another model", "was made with another model or processor"),
        ("other groups", "was made with another model or processor"),
        ("another format", "header"),
    ],
)
def test_a_file_that_is_no_index_for_this_stays_as_it_is(find, shapes, model, tmp_path, capsys, kind, message):
    file = tmp_path / "index.safetensors"
    if kind == "weights":
        shutil.copyfile(model / "model.safetensors", file)
    elif kind == "another model":
        find(shapes / "rod" / "0.npy", shapes, "--index", file, model=save_model(tmp_path / "other", seed=1))
    elif kind == "other groups":
        other = shutil.copytree(model, tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        config["num_centers"][0] += 1
        (other / "config.json").write_text(json.dumps(config))
        find(shapes / "rod" / "0.npy", shapes, "--index", file, model=other)
    else:
        file.write_text("features of my parts")
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        find(shapes / "rod" / "0.npy", shapes, "--index", file)
    assert message in capsys.readouterr().err.lower() and file.read_bytes() == before
