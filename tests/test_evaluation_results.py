"""The result file: whole or absent, and refused when it contradicts itself."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_publishing import result

from jointmae_hf.evaluation.results import (
    ResultError,
    command_line,
    describe,
    provenance,
    read_result,
    read_results,
    summarize,
    weights_digest,
    write_result,
)
from jointmae_hf.training import pretraining


def test_a_result_is_read_as_it_was_written(tmp_path):
    written = result()
    write_result(written, tmp_path / "new" / "result.json")
    assert read_result(tmp_path / "new" / "result.json") == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]
    assert "accuracy: 51.0 ± 1.4 %" in describe(written)


def test_deviation_is_that_of_a_sample_and_needs_two_seeds():
    assert summarize([1.0, 3.0]) == {"values": [1.0, 3.0], "mean": 2.0, "deviation": pytest.approx(2**0.5)}
    assert summarize([1.0])["deviation"] is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(schema="other"), "has the schema 'other', expected 'jointmae_hf/result/1'"),
        (lambda r: r.pop("device"), "lacks device"),
        (lambda r: r.update(remark="good"), "unknown fields: remark"),
        (lambda r: r.update(task="sorting"), "`task` is 'sorting', expected one of"),
        (lambda r: r.update(chosen_on_test=0), "`chosen_on_test` is 0, expected bool"),
        (lambda r: r.update(seconds=True), "`seconds` is True, expected int or float"),
        (lambda r: r.update(seeds=[0, 0]), r"`seeds` is \[0, 0\], expected distinct"),
        (lambda r: r.update(seeds=[0, 1, 2]), "expected 3, as `seeds`"),
        (lambda r: r["model"].update(initialization="magic"), "`model.initialization` is 'magic'"),
        (lambda r: r["model"].pop("weights"), "expected an entry 'weights'"),
        (lambda r: r["split_sizes"].update(test=0), "`split_sizes.test` is 0, expected a number of shapes"),
        (lambda r: r["metrics"]["accuracy"].update(mean=99.0), "`metrics.accuracy.mean` is 99.0, expected 51.0"),
        (lambda r: r["metrics"]["accuracy"].update(values=[101.0, 1.0]), "101.0, expected percentages"),
        (lambda r: r.update(metrics={"map": r["metrics"]["accuracy"]}), "expected 'accuracy' among them"),
    ],
)
def test_a_file_that_contradicts_the_schema_is_refused(tmp_path, change, message):
    path = tmp_path / "result.json"
    write_result(result(), path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ResultError, match=message):
        read_result(path)


def test_files_that_are_no_results_are_refused_by_name(tmp_path):
    with pytest.raises(ResultError, match="cannot be read: No such file"):
        read_result(tmp_path / "nothing.json")
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(ResultError, match="half.json is not JSON"):
        read_result(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ResultError, match="has the schema None"):
        read_result(tmp_path / "list.json")
    with pytest.raises(ResultError, match="holds no results"):
        read_results([tmp_path])


def test_a_folder_is_searched_and_other_json_passed_over(tmp_path):
    write_result(result(), tmp_path / "a" / "result.json")
    write_result(replace(result(), seconds=1), tmp_path / "b.json")
    (tmp_path / "a" / "metrics.json").write_text('{"identity": 1}')
    assert [found.seconds for found in read_results([tmp_path])] == [90.0, 1]


def test_a_digest_knows_weights_by_value():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.bias[0] += 1
    assert weights_digest(first) != weights_digest(second)


# ---- Where a result comes from


@pytest.mark.parametrize(
    "gpu, environment, words, expected",
    [
        (False, {}, ["x.py", "--seeds", "0", "1"], "python x.py --seeds 0 1"),
        (
            False,
            {"ACCELERATE_MIXED_PRECISION": "no"},
            ["x.py", "--resume_from_checkpoint", "latest", "--seeds", "0"],
            "python x.py --seeds 0",
        ),
        (
            True,
            {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
            ["x.py", "--overwrite_output_dir", "--preset", "a b", "--resume-from-checkpoint=latest"],
            "accelerate launch --num_processes 2 --mixed_precision bf16 x.py --preset 'a b'",
        ),
        (
            False,
            {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
            ["x.py"],
            "ACCELERATE_USE_CPU=true ACCELERATE_MIXED_PRECISION=bf16 torchrun --nproc_per_node 2 x.py",
        ),
    ],
)
def test_the_command_makes_the_result_anew(monkeypatch, gpu, environment, words, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == expected


def test_a_result_of_several_origins_names_them_all():
    first = {"git_commit": "abc", "versions": {"torch": "2.1", "numpy": "2"}, "device": "a CPU"}
    second = {"git_commit": "abc-dirty", "versions": {"torch": "2.2", "numpy": "2"}, "device": "a CPU"}
    made = provenance([first, second, first], 3.0)
    assert (made["git_commit"], made["device"], made["seconds"]) == ("abc; abc-dirty", "a CPU", 3.0)
    assert made["versions"] == {"torch": "2.1; 2.2", "numpy": "2"}
    outside = {"git_commit": None, "versions": {}, "device": "a CPU"}
    assert provenance([outside, first], 3.0)["git_commit"] == "unknown; abc"


def test_a_commit_is_named_only_of_its_own_clone_and_marked_where_code_was_edited(monkeypatch, tmp_path):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(root):
        monkeypatch.setattr(pretraining, "__file__", str(root / "jointmae_hf" / "training" / "pretraining.py"))
        return pretraining.git_commit.__wrapped__()

    source, installed = tmp_path, tmp_path / ".venv" / "site-packages"
    names = ("README.md", "benchmarks/step.py", "benchmarks/results/step.json", "examples/results/pretrain.json")
    files = [tmp_path / name for name in names]
    files += [root / "jointmae_hf" / "training" / "pretraining.py" for root in (source, installed)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git("init")
    assert commit(source) is None
    git("add", "README.md", "benchmarks", "examples", "jointmae_hf")
    git("commit", "-m", "all")
    head = git("rev-parse", "HEAD")
    for file in (files[0], files[2], files[3]):  # documents and results
        file.write_text("2")
    assert commit(source) == head and commit(installed) is None
    for file in (files[1], files[4]):
        file.write_text("2")
        assert commit(source) == f"{head}-dirty"
        file.write_text("1")
