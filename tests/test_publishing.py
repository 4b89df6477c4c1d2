"""Tables and cards say what the result files say, and a folder that is pushed comes back the same."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

from jointmae_hf import (
    JointMAEConfig,
    JointMAEForPartSegmentation,
    JointMAEForPointCloudClassification,
    JointMAEForPreTraining,
    JointMAEPointCloudProcessor,
)
from jointmae_hf.evaluation.results import (
    ResultError,
    TaskResult,
    read_result,
    summarize,
    weights_digest,
    write_result,
)
from jointmae_hf.evaluation.tasks import encoder_parameters
from jointmae_hf.publishing import (
    PublishingError,
    build_model_folder,
    check_model_folder,
    draw_label_curve,
    results_table,
    rewrite_block,
)
from jointmae_hf.publishing.__main__ import main
from jointmae_hf.publishing.tables import dataset_name


CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_points": 64,
    "num_centers": [16, 8],
    "num_neighbors": [8, 4],
    "point_embed_sizes": [8, 16],
    "image_size": 16,
    "splat_size": 3,
    "patch_strides": [2, 2],
    "image_embed_sizes": [8, 16],
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "num_target_points": 8,
    "classifier_hidden_size": 16,
}


def result(task="linear_svm", values=(50.0, 52.0), metric="accuracy", kind="pretrained", weights=None, **changes):
    settings = {"test_split": "test", "ways": 5, "shots": 10, "gallery": "test", **changes.pop("settings", {})}
    return TaskResult(
        **{
            "task": task,
            "model": {"name": "outputs/pretrain", "initialization": kind, "parameters": 100, "weights": weights},
            "dataset": {"name": "examples/data/kicad-parts", "config_name": None, "splits": {}},
            "split_sizes": {"train": 1444, "test": 442, "classes": 37},
            "seeds": list(range(len(values))),
            "metrics": {metric: summarize(list(values))},
            "protocol": "everything fixed beforehand",
            "settings": settings,
            "chosen_on_test": False,
            "command": f"python examples/{task}.py --seeds 0 1",
            "git_commit": "0123456789",
            "versions": {"torch": "2"},
            "device": "a CPU",
            "seconds": 90.0,
            "finished": "2026-01-01T00:00:00+00:00",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What a pre-training run leaves."""
    folder = tmp_path_factory.mktemp("trained")
    config = JointMAEConfig(**CONFIG)
    torch.manual_seed(0)
    JointMAEForPreTraining(config).save_pretrained(folder)
    JointMAEPointCloudProcessor.from_config(config).save_pretrained(folder)
    (folder / "log.jsonl").write_text(
        '{"step": 10, "loss": 2.0, "loss_3d": 1.0}\n{"step": 20, "loss": 1.0, "loss_3d": 0.5}\n'
    )
    (folder / "reconstructions.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def digest(trained) -> str:
    return weights_digest(JointMAEForPreTraining.from_pretrained(trained).joint_mae)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    """The folder of a released segmentation head."""
    source = tmp_path_factory.mktemp("tuned")
    config = JointMAEConfig(**CONFIG, num_labels=3, num_object_classes=2, object_classes=["rod", "disc"])
    JointMAEForPartSegmentation(config).save_pretrained(source)
    JointMAEPointCloudProcessor.from_config(config, num_points=50).save_pretrained(source)
    options = {"repo_id": "org/head", "license": "mit", "results": []}
    return build_model_folder(source, source.parent / "head", **options)


def test_a_table_sets_results_side_by_side():
    table = results_table(
        [
            result("part_segmentation", (60.0,), "instance_miou"),
            result(values=(50.0, 52.0)),
            result(values=(40.0,), kind="untrained"),
            result(values=(45.0,), kind="random_forest", chosen_on_test=True),
            result("few_shot", (80.0,), settings={"ways": 10, "queries": 20}),
            result("few_shot", (81.0,), settings={"ways": 10, "queries": 10}),
        ]
    )
    assert table.splitlines() == [
        "| task | data set | metric, % | pre-trained | untrained | random forest |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| linear SVM | kicad-parts | accuracy | 51.0 ± 1.4 (2) | 40.0 | 45.0 (chosen on test) |",
        "| few-shot, 10-way 10-shot | kicad-parts | accuracy | 80.0 |  |  |",
        "| few-shot, 10-way 10-shot, 10 queries | kicad-parts | accuracy | 81.0 |  |  |",
        "| part segmentation | kicad-parts | instance mIoU | 60.0 |  |  |",
    ]


@pytest.mark.parametrize(
    "name, shown",
    [("examples/data/kicad-parts", "kicad-parts"), ("/sets/ldraw/data", "ldraw"), ("org/shapes", "shapes")]
    + [("/sets/ldraw/*.parquet", "ldraw"), ("data", "data"), (".", "."), ("/tmp/x.parquet", "x"), ("a|b", "a\\|b")]
    + [("/sets/ldraw/data/train-00000-of-00001.parquet", "ldraw"), ("test_set.parquet", "test_set")],
)
def test_a_data_set_is_shown_by_the_telling_part_of_its_path(name, shown):
    assert dataset_name(result(dataset={"name": name, "config_name": None, "splits": {}})) == shown


def test_two_results_for_one_cell_are_refused():
    with pytest.raises(ResultError, match="two results are for linear SVM, kicad-parts, accuracy, pre-trained"):
        results_table([result(), result()])
    assert len(results_table([result(), result("retrieval", metric="map")]).splitlines()) == 4


@pytest.mark.parametrize(
    "changes, differs",
    [
        ({"dataset": {"name": "kicad-parts", "config_name": None, "splits": {"test": {"crc32": 2}}}}, "crc32': 2"),
        ({"split_sizes": {"train": 700, "test": 442, "classes": 37}}, "`split_sizes.train` is 700"),
        ({"settings": {"test_split": "validation"}}, "`settings.test_split` is 'validation'"),
        ({"settings": {"num_points": 2048}}, "`settings.num_points` is 2048"),
        ({"settings": {"steps": 300}}, "`settings.steps` is 300"),
        ({"settings": {"batch_size_used": 8}}, "`settings.batch_size_used` is 8"),
        ({"settings": {"learning_rate": 5e-4}}, "`settings.learning_rate` is 0.0005"),
        ({"settings": {"scale_min": 0.5}}, "`settings.scale_min` is 0.5"),
        ({"settings": {"config_overrides": None}}, "`settings.config_overrides` is None"),
        ({"model": {"name": "m", "initialization": "from_scratch", "parameters": 9, "weights": None}}, "parameters"),
    ],
)
def test_results_that_are_not_comparable_are_not_set_side_by_side(changes, differs):
    dataset = {"name": "kicad-parts", "config_name": None, "splits": {"test": {"crc32": 1}}}
    points, training = {"num_points": 1024, "scale_min": 0.8}, {"steps": 800, "batch_size_used": 32}
    training |= {"learning_rate": 2e-3, "config_overrides": "classifier_dropout=0.1"}

    def measured(kind, settings, **changes):
        command = f"python {kind}.py"
        return result(
            "classification", kind=kind, command=command, **{"dataset": dataset, **changes}, settings=settings
        )

    settings = points | training
    forest = measured("random_forest", points | {"learning_rate": 5e-4})  # which it does not use
    tuned = measured("pretrained", settings | {"encoder_lr_scale": 0.1})
    assert len(results_table([forest, tuned, measured("from_scratch", settings.copy())]).splitlines()) == 3
    changes = {**changes, "settings": settings | changes.get("settings", {})}
    with pytest.raises(ResultError, match=f"{differs}.*in that of `python from_scratch.py`, but "):
        results_table([forest, tuned, measured("from_scratch", **changes)])


def test_draws_of_few_shots_and_the_C_of_an_svm_are_compared():
    folds = [result("few_shot", (80.0, 81.0)), result("few_shot", (70.0,), kind="untrained")]
    with pytest.raises(ResultError, match=r"`seeds` is \[0\].*but \[0, 1\]"):
        results_table(folds)
    svms = [result(settings={"C": [0.01]}), result(kind="untrained", settings={"C": [1.0]})]
    with pytest.raises(ResultError, match=r"`settings.C` is \[1.0\]"):
        results_table(svms)


def test_a_table_is_of_one_pretrained_model(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:x --><!-- /results:x -->")
    write_result(result(weights="1" * 64), tmp_path / "a.json")
    write_result(result("retrieval", metric="map", weights="2" * 64), tmp_path / "b.json")
    with pytest.raises(ResultError, match="are of several pre-trained models"):
        main(["tables", str(readme), "x", str(tmp_path)])


def test_only_the_marked_block_of_a_text_changes():
    text = "before\n<!-- results:a -->\nold\n<!-- /results:a -->\nafter \\1\n"
    new = rewrite_block(text, "a", "| new \\1 |")
    assert new == "before\n<!-- results:a -->\n\n| new \\1 |\n\n<!-- /results:a -->\nafter \\1\n"
    assert rewrite_block(new, "a", "| new \\1 |") == new
    with pytest.raises(ValueError, match="must hold <!-- results:b -->"):
        rewrite_block(text, "b", "")


def test_a_readme_is_rewritten_from_result_files(tmp_path):
    write_result(result(), tmp_path / "runs" / "svm.json")
    (tmp_path / "runs" / "other.json").write_text('{"no": "result"}')
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- results:x -->\n<!-- /results:x -->\n")
    main(["tables", str(readme), "x", str(tmp_path / "runs"), "--commands"])
    assert (
        "51.0 ± 1.4 (2)" in readme.read_text() and "`python examples/linear_svm.py --seeds 0 1`" in readme.read_text()
    )


def test_a_readme_is_rewritten_with_the_report_of_a_pretraining_run(tmp_path):
    readme, run = tmp_path / "README.md", tmp_path / "result.json"
    readme.write_text("<!-- results:run --><!-- /results:run -->")
    losses = {"held_out": {"loss_3d": 0.00512}, "encoder_output_averaged": {"loss_3d": 0.01}}  # 3D alone
    svm = {"classes": 37, "pretrained": {"accuracy": 55.55}, "untrained": {"accuracy": 50.0}}
    run.write_text(json.dumps({"report": {"reconstruction": losses, "linear_svm": svm}}))
    main(["report", str(readme), "run", str(run)])
    cells = [
        [cell.strip() for cell in line.split("|")[1:4]] for line in readme.read_text().splitlines() if "|" in line
    ]
    assert cells[2:] == [["3D loss (Chamfer), 1e-3", "5.12", "10.00"], ["linear SVM, 37 classes, %", "55.5", "50.0"]]
    run.write_text(json.dumps({"steps": 3}))
    before = readme.read_text()
    with pytest.raises(ResultError, match="result.json is not the result of a pre-training run with a report"):
        main(["report", str(readme), "run", str(run)])
    assert readme.read_text() == before


def test_a_curve_is_drawn_of_one_task_on_one_data_set(tmp_path):
    for index, (kind, size) in enumerate([("pretrained", 37), ("pretrained", 700), ("from_scratch", 700)]):
        sizes = {"train": size, "test": 442, "classes": 37}
        write_result(result("classification", kind=kind, split_sizes=sizes), tmp_path / f"{index}.json")
    main(["curve", str(tmp_path / "curve.png"), str(tmp_path)])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    for change, message in (
        ({"chosen_on_test": True}, "was chosen on test data"),
        ({"settings": {"train_fraction": 0.1, "num_points": 2048}}, "`settings.num_points` is 2048"),
        ({"weights": "1" * 64}, "`model.weights` is '1111"),
        ({"settings": {"train_fraction": 0.5, "num_points": 1024, "config_overrides": "a=1"}}, "config_overrides"),
    ):
        settings = {"train_fraction": 0.5, "num_points": 1024, "config_overrides": None}
        points = [result("classification", settings=settings), result("classification", **change)]
        with pytest.raises(ResultError, match=message):
            draw_label_curve(points, tmp_path / "refused.png")
    assert not (tmp_path / "refused.png").exists()
    write_result(result("retrieval", metric="map"), tmp_path / "3.json")
    with pytest.raises(ResultError, match="expected one task on one data set"):
        main(["curve", str(tmp_path / "curve.png"), str(tmp_path)])


def test_a_card_is_made_of_its_results(trained, digest, tmp_path):
    results = [
        result(weights=digest),
        result(values=(40.0,), kind="untrained"),
        result("few_shot", (70.0,), weights=digest),
        result("few_shot", (60.0,), weights=digest, settings={"ways": 10}),
        result("retrieval", (99.0,), "map", weights=digest, chosen_on_test=True),
    ]
    notes = tmp_path / "notes.md"
    notes.write_text("## Limits\n\nNone known.\n")
    training = Path(__file__).parents[1] / "examples" / "results" / "pretrain.json"
    options = {"repo_id": "org/tiny", "license": "apache-2.0", "training": [training], "notes": notes}
    folder = build_model_folder(trained, tmp_path / "tiny", results=results, **options)
    check_model_folder(folder)
    assert not (folder / "log.jsonl").exists() and (folder / "losses.png").read_bytes().startswith(b"\x89PNG")

    card = ModelCard.load(folder / "README.md")
    found = {(entry.task_name, entry.metric_value) for entry in card.data.eval_results}
    assert found == {
        ("linear SVM", 51.0),
        ("few-shot, 5-way 10-shot", 70.0),
        ("few-shot, 10-way 10-shot", 60.0),
    }
    assert (card.data.model_name, card.data.license, card.data.library_name) == ("tiny", "apache-2.0", "transformers")
    for expected in (
        "51.0 ± 1.4 (2) | 40.0",
        "99.0 (chosen on test)",
        "28,800",
        "None known.",
        "and what it reconstructed](reconstructions.png)",
        "[Every loss of the training against its steps, on a logarithmic axis](losses.png)",
        "--seeds 0 1`",
    ):
        assert expected in card.text


def test_a_card_counts_the_samples_and_the_time_of_all_runs_of_training(trained, tmp_path):
    run = json.loads((Path(__file__).parents[1] / "examples" / "results" / "pretrain.json").read_text())
    files = []
    for number, steps in enumerate((1000, 500)):
        changes = {"steps": steps, "seconds": 120 * steps, "command": f"python stage-{number}.py", "seed": number}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(run | changes | {"git_commit": f"{number}123456789-dirty"}))
    arguments = ["card", str(trained), str(tmp_path / "card"), "--repo_id", "org/tiny", "--license", "apache-2.0"]
    main([*arguments, "--training", *map(str, files)])
    text = (tmp_path / "card" / "README.md").read_text()
    size = run["arguments"]["batch_size"]
    for expected in (
        f"| samples seen | {1500 * size:,} |",
        "| time | 3,000 min,",
        f"| steps | 1,000 of {size}; then 500 of {size} |",
        "| seed | 0; then 1 |",
        "| `python stage-0.py` | 0123456-dirty |",
        "| `python stage-1.py` | 1123456-dirty |",
    ):
        assert expected in text
    assert text.count(f"| versions | python {run['versions']['python']}") == 1


def test_a_card_refuses_training_that_ended_with_other_weights(trained, digest, tmp_path):
    run = json.loads((Path(__file__).parents[1] / "examples" / "results" / "pretrain.json").read_text())
    options = {"repo_id": "org/tiny", "license": "mit", "results": [], "training": [tmp_path / "result.json"]}
    (tmp_path / "result.json").write_text(json.dumps(run | {"weights_digest": "0" * 64}))
    with pytest.raises(ResultError, match="is of a run that ended with other weights"):
        build_model_folder(trained, tmp_path / "card", **options)
    (tmp_path / "result.json").write_text(json.dumps(run | {"weights_digest": digest}))
    build_model_folder(trained, tmp_path / "card", half=True, **options)


def test_rounding_makes_the_same_bytes_every_time(trained, tmp_path):
    options = {"repo_id": "org/tiny", "license": "mit", "results": [], "half": True}
    folders = [build_model_folder(trained, tmp_path / str(number), **options) for number in range(6)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    folder = build_model_folder(folders[0], tmp_path / "again", **options)
    assert (folder / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()
    model, rounded = (JointMAEForPreTraining.from_pretrained(place).state_dict() for place in (trained, folder))
    assert all(torch.equal(tensor.half().float(), rounded[name]) for name, tensor in model.items())


def test_a_card_is_not_written_over_other_files(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("precious")
    options = {"repo_id": "org/tiny", "license": "mit", "results": []}
    with pytest.raises(PublishingError, match="which holds other files, expected a new folder or one of a model"):
        build_model_folder(trained, tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "README.md").read_text() == "precious"
    with pytest.raises(PublishingError, match="nowhere, which holds no config.json"):
        build_model_folder(tmp_path / "nowhere", tmp_path / "card", **options)


def test_the_code_on_a_card_runs_as_it_stands_and_the_card_names_the_classes(head, tmp_path):
    text = (head / "README.md").read_text()
    assert "Object classes: 0 rod, 1 disc." in text
    np.savetxt(tmp_path / "part.xyz", np.random.default_rng(0).normal(size=(100, 3)))
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("org/head", str(head)).replace("part.stl", str(tmp_path / "part.xyz"))
    names = {}
    exec(code, names)
    assert names["outputs"].logits.shape == (1, 50, 3)


def test_a_card_refuses_numbers_of_other_weights(trained, digest, tmp_path):
    options = {"repo_id": "org/tiny", "license": "apache-2.0"}
    with pytest.raises(ResultError, match="measured with other weights"):
        build_model_folder(trained, tmp_path / "tiny", results=[result(weights="0" * 64)], **options)
    assert not (tmp_path / "tiny").exists()
    # A fine-tuned head is known by the weights that its run ended with.
    model = JointMAEForPointCloudClassification.from_pretrained(trained, num_labels=3)
    model.save_pretrained(tmp_path / "head")
    JointMAEPointCloudProcessor.from_config(model.config).save_pretrained(tmp_path / "head")
    tuned = result("classification", weights="1" * 64)
    tuned.model["final_weights"] = [weights_digest(model)]
    folder = build_model_folder(tmp_path / "head", tmp_path / "card", results=[tuned], **options)
    assert "AutoModelForImageClassification" in (folder / "README.md").read_text()


def test_a_card_knows_results_of_its_weights_before_and_after_they_are_rounded(trained, digest, tmp_path):
    options = {"repo_id": "org/tiny", "license": "apache-2.0", "half": True}
    folder = build_model_folder(trained, tmp_path / "tiny", results=[result(weights=digest)], **options)
    assert "results were measured before that" in (folder / "README.md").read_text()
    model = JointMAEForPreTraining.from_pretrained(folder)
    assert model.dtype == torch.float32
    for name, tensor in JointMAEForPreTraining.from_pretrained(trained).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float())
    assert (folder / "model.safetensors").stat().st_size < 0.6 * (trained / "model.safetensors").stat().st_size
    rounded = result(weights=weights_digest(model.joint_mae))
    folder = build_model_folder(trained, tmp_path / "tiny", results=[rounded], **options)
    assert "results were measured after that" in (folder / "README.md").read_text()
    # The folder alone knows both, rounded once more or not.
    for half in (True, False):
        again = build_model_folder(
            folder, tmp_path / "again", results=[result(weights=digest)], **options | {"half": half}
        )
        assert "results were measured before that" in (again / "README.md").read_text()
        assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(ResultError, match="measured with other weights"):
        build_model_folder(trained, tmp_path / "tiny", results=[result(weights="0" * 64)], **options)


def test_a_folder_that_is_no_repository_is_refused(trained, tmp_path):
    options = {"repo_id": "org/tiny", "license": "apache-2.0", "results": []}
    with pytest.raises(PublishingError, match="lacks README.md"):
        check_model_folder(trained)
    folder = build_model_folder(trained, tmp_path / "tiny", **options)
    (folder / "optimizer.bin").write_bytes(b"")
    (folder / "checkpoint-3").mkdir()
    with pytest.raises(PublishingError, match="holds checkpoint-3, optimizer.bin, which do not belong"):
        check_model_folder(folder)
    with pytest.raises(PublishingError, match="there is no such folder"):
        check_model_folder(tmp_path / "nowhere")
    with pytest.raises(PublishingError, match="is not the result of a pre-training run"):
        build_model_folder(trained, tmp_path / "tiny", training=[folder / "config.json"], **options)


def replace(old: str, new: str):
    return lambda data: data.replace(old.encode(), new.encode())


@pytest.mark.parametrize(
    "file, change, expected",
    [
        ("README.md", replace("license: mit", "license: [mit"), "README.md cannot be read: ParserError"),
        ("config.json", lambda data: data[:50], "config.json cannot be read: JSONDecodeError"),
        ("config.json", lambda data: b"[]", "config.json holds no settings, but list"),
        (
            "config.json",
            replace('"JointMAEForPartSegmentation"\n', ""),
            r"`architectures` is \[\] in .*, expected one of",
        ),
        (
            "config.json",
            replace('"JointMAEForPartSegmentation"', '"BertModel"'),
            r"`architectures` is \['BertModel'\]",
        ),
        (
            "config.json",
            replace("AutoModelForSem", "AutoModelForNo"),
            "names no AutoModelForSemanticSegmentation in its",
        ),
        ("config.json", replace('"modeling', '"you/other--modeling'), "gives 'you/other--model.* no code of its own"),
        ("preprocessor_config.json", lambda data: data[:50], "cannot be used by the package: OSError"),
        ("preprocessor_config.json", replace("4\n", "3\n"), r"`num_neighbors` is \[8, 3\] in .*, expected \[8, 4\]"),
        ("model.safetensors", lambda data: data[: len(data) // 2], "cannot be used by the package: SafetensorError"),
        (
            "config.json",
            replace('er_hidden_size": 16', 'er_hidden_size": 20'),
            r"`.*` has shape .*, but its config.json",
        ),
        ("modeling_joint_mae.py", replace("(hidden)\n", "(missing)\n"), "by its own code: NameError"),
        ("modeling_joint_mae.py", replace("self.out_proj(hidden)", "self.out_proj(-hidden)"), "computes other values"),
        ("geometry_joint_mae.py", lambda data: data + b"def (", "by its own code: SyntaxError"),
    ],
)
def test_a_broken_folder_is_refused_with_the_reason(head, tmp_path, file, change, expected):
    folder = Path(shutil.copytree(head, tmp_path / "head"))
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(PublishingError, match=expected):
        check_model_folder(folder)


def test_a_card_without_its_picture_is_refused(trained, tmp_path):
    folder = build_model_folder(trained, tmp_path / "a", repo_id="org/a", license="mit", results=[])
    (folder / "losses.png").unlink()
    with pytest.raises(PublishingError, match="shows or links to losses.png, which is not in the folder"):
        check_model_folder(folder)


def test_licences_and_attribution_may_be_added_and_nothing_else(trained, tmp_path):
    (tmp_path / "ATTRIBUTION.md").write_text("by them")
    options = {"repo_id": "org/a", "license": "mit", "results": []}
    folder = build_model_folder(trained, tmp_path / "a", attach=[tmp_path / "ATTRIBUTION.md"], **options)
    check_model_folder(folder)
    assert (folder / "ATTRIBUTION.md").read_text() == "by them"
    (tmp_path / "weights.bin").write_bytes(b"1")
    with pytest.raises(PublishingError, match="`attach` has .*weights.bin, expected files whose name is one of"):
        build_model_folder(trained, tmp_path / "b", attach=[tmp_path / "weights.bin"], **options)


def test_a_card_that_loads_from_elsewhere_is_refused(head):
    check_model_folder(head, "org/head")
    with pytest.raises(PublishingError, match="loads a model from org/head, expected me/head: .* --repo_id me/head"):
        check_model_folder(head, "me/head")


# ---- The released models


ROOT = Path(__file__).parents[1]
RELEASED = sorted(file.parent for file in ROOT.glob("model_cards/*/config.json"))


# Bytes of a folder and parameters of its 3D encoder, at most.
LIMITS = {"tiny": (12e6, 3e6), "small": (18e6, 7e6)}


def test_there_are_released_models():
    heads = {f"joint-mae-tiny-kicad-{task}" for task in ("classification", "segmentation")}
    assert {"joint-mae-tiny", "joint-mae-small", *heads} <= {folder.name for folder in RELEASED}


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_a_released_folder_is_a_repository_that_loads(folder):
    check_model_folder(folder)
    most_bytes, most_parameters = LIMITS[folder.name.split("-")[2]]
    assert sum(file.stat().st_size for file in folder.iterdir()) < most_bytes
    model = AutoModel.from_pretrained(folder).eval()
    assert encoder_parameters(model) < most_parameters and model.dtype == torch.float32
    shape = AutoProcessor.from_pretrained(folder)(np.random.default_rng(0).normal(size=(3000, 3)))
    with torch.no_grad():
        features = model(**shape).pooler_output
    assert features.shape == (1, model.config.pooled_size) and features.isfinite().all()


@pytest.mark.parametrize(
    ("name", "results", "least"), [("joint-mae-tiny", "downstream", 20), ("joint-mae-small", "downstream_small", 14)]
)
def test_the_released_results_are_of_the_released_weights(name, results, least):
    digest = weights_digest(AutoModel.from_pretrained(ROOT / "model_cards" / name))
    files = sorted(ROOT.glob(f"benchmarks/results/{results}/*/*-pretrained*.json"))
    assert len(files) >= least
    for file in files:
        assert read_result(file).model["weights"] == digest, file


# ---- With a Hub


def client_publish(folder: str) -> dict:
    """Pushes by the example over an older release, then with something wrong on the way."""
    import logging
    import os
    import runpy

    import jointmae_hf
    from jointmae_hf.publishing import hub

    hub.HfApi().create_repo("org/tiny")
    hub.HfApi().upload_file(path_or_fileobj=b"old", path_in_repo="old.png", repo_id="org/tiny")
    seen = {"something else": refusal(hub.publish_folder, folder, "org/tiny")}
    earlier = json.dumps({"model_type": "joint_mae"}).encode()
    hub.HfApi().upload_file(path_or_fileobj=earlier, path_in_repo="config.json", repo_id="org/tiny")
    example = str(Path(jointmae_hf.__file__).parents[1] / "examples" / "publish.py")
    sys.argv = ["publish.py", folder, "org/tiny"]
    runpy.run_path(example, run_name="__main__")
    loggers = ("httpx", "httpx2", "transformers", "jointmae_hf")
    seen["levels"] = [logging.getLogger(name).getEffectiveLevel() for name in loggers]
    card, config = Path(folder) / "README.md", Path(folder) / "config.json"
    based, text = card.read_text(), config.read_text()
    revision = hub.HfApi().list_repo_commits("org/tiny")[0].commit_id
    config.write_text(text.replace('"auto_map"', '"no_auto_map"'))
    seen["without code"] = refusal(hub.publish_folder, folder, "org/tiny")
    config.write_text(text)
    card.write_text(based.replace("license:", "base_model: org/nowhere\nlicense:"))
    seen["base model"] = refusal(hub.publish_folder, folder, "org/tiny")
    card.write_text(based)
    seen["no branch"] = refusal(hub.publish_folder, folder, "org/tiny", revision="nowhere")
    token, os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"], "unknown"
    seen["no login"] = refusal(runpy.run_path, example, run_name="__main__")
    os.environ["HF_TOKEN"] = token
    seen["untouched"] = hub.HfApi().list_repo_commits("org/tiny")[0].commit_id == revision
    config.write_text(text + "\n")
    seen["altered"] = refusal(hub.verify_published, folder, "org/tiny", revision)
    config.write_text(text)
    return seen


def refusal(function, *arguments, **options) -> str:
    """What `function` refuses with."""
    with pytest.raises((PublishingError, SystemExit)) as error:
        function(*arguments, **options)
    return str(error.value)


def test_a_folder_is_pushed_and_verified(trained, digest, tmp_path):
    folder = build_model_folder(
        trained, tmp_path / "tiny", repo_id="org/tiny", license="apache-2.0", results=[result(weights=digest)]
    )
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with HubServer() as hub:
        seen = hub.call(client_publish, tmp_path, str(folder))
        pushed = hub.files("org/tiny")
    assert {name: data for name, data in pushed.items() if name != ".gitattributes"} == files
    assert json.loads(pushed["config.json"])["architectures"] == ["JointMAEForPreTraining"]
    assert "holds 1 files, such as old.png, and no config.json" in seen["something else"]
    assert seen["levels"] == [30, 30, 40, 20]
    assert "auto_map" in seen["without code"] and seen["untouched"]
    assert "`base_model` is 'org/nowhere'" in seen["base model"]
    assert "no such repository or branch" in seen["no branch"]
    assert seen["no login"].startswith("error: org/tiny on the Hub: ") and "hf auth login" in seen["no login"]
    assert "config.json in org/tiny is not the one in" in seen["altered"]
