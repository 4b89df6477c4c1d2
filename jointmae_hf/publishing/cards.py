"""Model cards made from result files, and the folder that is a repository of the Hub."""

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..evaluation.results import TASKS, ResultError, TaskResult, weights_digest
from .curves import draw_losses
from .hub import AUTO_CLASSES, LICENCES, MODEL_FILES, PICTURES, PublishingError, load_model
from .tables import METRIC_NAMES, TASK_NAMES, commands_table, dataset_name, reproduction, results_table, task_name


_TASK_TYPES = {"retrieval": "point-cloud-retrieval", "part_segmentation": "point-cloud-segmentation"}
_KINDS = {
    "JointMAEForPreTraining": "Joint-MAE, pre-trained on point clouds without labels",
    "JointMAEModel": "The encoder of a pre-trained Joint-MAE",
    "JointMAEForPointCloudClassification": "Joint-MAE, fine-tuned to classify point clouds",
    "JointMAEForPartSegmentation": "Joint-MAE, fine-tuned to label the parts of point clouds",
}
# What pictures show, for those who cannot see them.
_CAPTIONS = {
    "losses.png": "Every loss of the training against its steps, on a logarithmic axis",
    "reconstructions.png": "Held-out shapes, one a row: points and depth image, what of them the model saw, and what "
    "it reconstructed",
}

# Where a file of rounded weights keeps the digests of what they were.
_ROUNDED_FROM = "rounded_from"

_TEXT = """# {name}

{kind} ([paper](https://arxiv.org/abs/2302.14007), unofficial implementation).
{parameters:,} parameters, {encoder:,} of them in the 3D encoder; {num_points:,} points a cloud, {num_tokens} tokens of
width {hidden_size}. Weights are safetensors.

```python
{imports}from transformers import AutoProcessor, {auto_class}

name = "{repo_id}"
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
model = {auto_class}.from_pretrained(name, trust_remote_code=True).eval()
points = "part.stl"  # or an array (n, 3), or a list of them
{told}outputs = model(**processor(points){given})  # {output}
```

With `import jointmae_hf` the same calls need no `trust_remote_code`.
{classes}"""


def build_model_folder(
    source: str | Path, output: str | Path, half: bool = False, attach: Sequence[str | Path] = (), **card: Any
) -> Path:
    """
    Makes the folder of a released model from what training left: model, processor, code, pictures and a new card.

    Args:
        source: an output folder of training.
        output: the new folder; its files are replaced, others stay.
        attach: files to add: licences and attribution, by their names.
        half: whether weights are rounded to float16, half the size; the configuration still has them loaded as it
            says, float32. Results may have been measured before or after: the file keeps the digests of before.
        card: as for [`model_card`].

    Raises:
        PublishingError: if `source` lacks a file of a model, `output` holds something else, or `attach` has a file of
            another kind.
        ResultError: if a result was not measured with these weights.
    """
    source, output = Path(source), Path(output)
    if not (source / "config.json").is_file():
        raise PublishingError(f"`source` is {source}, which holds no config.json, expected a folder of a model.")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file())):
        raise PublishingError(
            f"`output` is {output}, which holds other files, expected a new folder or one of a model."
        )
    files = [file for pattern in (*MODEL_FILES, PICTURES) for file in sorted(source.glob(pattern))]
    for file in map(Path, attach):
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in LICENCES):
            raise PublishingError(f"`attach` has {file}, expected files whose name is one of {', '.join(LICENCES)}.")
        files.append(file)
    log = source / "log.jsonl"
    with tempfile.TemporaryDirectory() as staging:
        for file in files:
            shutil.copyfile(file, Path(staging) / file.name)
        if log.exists():
            draw_losses(log, Path(staging) / "losses.png")
        if half:
            _round_weights(Path(staging) / SAFE_WEIGHTS_NAME, _digests(load_model(source)))
        text = str(model_card(staging, **card))
        (Path(staging) / "README.md").write_text(text, encoding="utf-8")
        output.mkdir(parents=True, exist_ok=True)  # not `copytree`, which hands on that only its owner may look inside
        for file in Path(staging).iterdir():
            shutil.copyfile(file, output / file.name)
    return output


def _round_weights(file: Path, digests: set[str]):
    """Rounds the weights of a file to float16, and keeps the digests that they had: results may be of those."""
    with safe_open(file, "pt") as weights:
        metadata = weights.metadata() or {}
        if _ROUNDED_FROM in metadata:
            return
        rounded = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118, it is no dict
    for name, tensor in rounded.items():
        if tensor.is_floating_point():
            rounded[name] = tensor.half()
            if not rounded[name].isfinite().all():
                raise PublishingError(f"{file.name} cannot be rounded to float16: {name} is out of its range.")
    save_file(rounded, file, metadata | {_ROUNDED_FROM: " ".join(sorted(digests))})
    _sort_metadata(file)


def _sort_metadata(file: Path):
    """Orders the metadata of a safetensors file, which its writer leaves to chance: same weights, same bytes."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def model_card(
    folder: str | Path,
    repo_id: str,
    results: list[TaskResult],
    license: str,
    training: Sequence[str | Path] = (),
    notes: str | Path | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
) -> ModelCard:
    """
    The card of a model: metadata with a `model-index`, use, results, training, how to reproduce, limits.

    Args:
        folder: holds the model; its pictures (`*.png`) are shown.
        repo_id: name on the Hub, `owner/name`.
        results: of this model, and of what it is compared with (untrained, from scratch, random forest). Those that
            were chosen on test data are in the table, so marked, but not in the metadata.
        license: identifier of the Hub's list, such as `apache-2.0`.
        training: `result.json` of each pre-training run that the model went through, in their order.
        notes: Markdown to add, such as data licences and limits.
        base_model: what the model was fine-tuned from.
        datasets: names on the Hub of the training data, for the metadata.

    Raises:
        PublishingError: if the folder is no model, or a file of `training` no result of pre-training.
        ResultError: if a result was measured with other weights than those in the folder.
    """
    folder = Path(folder)
    model = load_model(folder)
    known = _digests(model)
    with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as weights:
        rounded_from = (weights.metadata() or {}).get(_ROUNDED_FROM)
    before = set() if rounded_from is None else set(rounded_from.split()) - known
    for result in results:
        _check_weights(result, known | before)
    own = [result for result in results if result.model["initialization"] == "pretrained"]
    comparable = [result for result in own if not result.chosen_on_test]
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        tags=["point-cloud", "3d", "joint-mae", "self-supervised-learning"],
        base_model=base_model,
        datasets=datasets,
        metrics=sorted({TASKS[result.task] for result in comparable}) or None,
        eval_results=[entry for result in comparable for entry in _eval_results(result)] or None,
    )
    parts = [_introduction(model, name, repo_id)]
    if rounded_from is not None:
        when = "before that" if any(_weights(result) & before for result in own) else "after that"
        parts.append(f"Weights are rounded to float16 and loaded as float32; results were measured {when}.\n")
    pictures = sorted(folder.glob(PICTURES))
    parts += [f"![{_CAPTIONS.get(file.name, file.stem.replace('_', ' '))}]({file.name})\n" for file in pictures]
    if results:
        parts.append(_results_section(results))
    stages = [_read_training(Path(file)) for file in training]
    if stages and stages[-1]["weights"] not in (None, *known, *before):
        raise ResultError(
            f"{training[-1]} is of a run that ended with other weights than those in the folder of the card."
        )
    if stages:
        parts.append(_training_section(stages))
    if stages or results:
        rows = [stage["row"] for stage in stages]
        parts.append("## How to reproduce\n\n" + commands_table(results, rows) + "\n")
    if notes is not None:
        parts.append(Path(notes).read_text(encoding="utf-8"))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(part.strip() + "\n" for part in parts))


def _introduction(model: PreTrainedModel, name: str, repo_id: str) -> str:
    config, kind = model.config, type(model).__name__
    auto_class = AUTO_CLASSES[kind][0]
    encoder = sum(
        parameter.numel()
        for key, parameter in model.base_model.named_parameters()
        if not key.startswith("image_embeddings.")
    )
    output = {
        "AutoModel": f"outputs.pooler_output: (1, {config.pooled_size})",
        "AutoModelForImageClassification": f"outputs.logits: (1, {config.num_labels})",
        "AutoModelForSemanticSegmentation": f"outputs.logits: (1, points, {config.num_labels})",
    }[auto_class]
    imports = told = given = classes = ""
    if auto_class == "AutoModelForSemanticSegmentation" and config.num_object_classes > 0:
        where = "listed in model.config.object_classes" if config.object_classes else "as in the training data"
        imports, given = "import torch\n", ", object_class=object_class"
        told = f"object_class = torch.tensor([0])  # one for each cloud, {where}\n"
        if config.object_classes:
            listed = ", ".join(f"{index} {name}" for index, name in enumerate(config.object_classes))
            classes = f"\nObject classes: {listed}.\n"
    return _TEXT.format(
        imports=imports,
        told=told,
        given=given,
        classes=classes,
        name=name,
        kind=_KINDS[kind],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        encoder=encoder,
        num_points=config.num_points,
        num_tokens=config.num_centers[-1],
        hidden_size=config.hidden_size,
        auto_class=auto_class,
        repo_id=repo_id,
        output=output,
    )


def _results_section(results: list[TaskResult]) -> str:
    lines = [
        "## Results",
        "",
        results_table(results),
        "",
        "Percent on held-out shapes: mean ± sample deviation (number of seeds). Protocols:",
        "",
    ]
    measured_on: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        sizes = ", ".join(f"{size:,} {part}" for part, size in result.split_sizes.items())
        on = measured_on.setdefault((task_name(result), _whole_protocol(result)), {})
        on[f"{dataset_name(result)} ({sizes})"] = None
    protocols = [f"- {task}, {'; '.join(on)}: {protocol}." for (task, protocol), on in measured_on.items()]
    return "\n".join([*lines, *protocols, ""])


def _whole_protocol(result: TaskResult) -> str:
    """The protocol in words, with what older results have in their settings alone."""
    settings, parts = result.settings, [result.protocol]
    is_network = result.model["initialization"] != "random_forest"
    overrides = settings.get("config_overrides")
    if is_network and overrides and "configuration with" not in result.protocol:
        parts.append(f"configuration with {overrides}")
    if result.task == "part_segmentation" and settings.get("use_object_class", True):
        parts.append("the class of each object is given and only parts that its class has are predicted")
    return ", ".join(parts)


def _read_training(file: Path) -> dict[str, Any]:
    """What the result of a pre-training run says: `samples`, `seconds`, its row among the commands, and the rest."""
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        arguments = run["arguments"]
        size, steps = arguments["batch_size"], run["steps"]
        parts = run["dataset"] if isinstance(run["dataset"], list) else [run["dataset"]]  # of a mixture, its sources
        content = "; ".join(", ".join(f"{key} {value}" for key, value in part.items()) for part in parts)
        data = arguments.get("train_data") or arguments["dataset"]
        device = f"{run['device']}, {run['num_processes']} process(es)"
        return {
            "weights": run.get("weights_digest"),
            "samples": steps * size,
            "seconds": run["seconds"],
            "row": [
                "pre-training",
                data,
                "",
                *reproduction(run["command"], run["git_commit"], device, run["seconds"]),
            ],
            "shown": {
                "data": f"{data} ({content})",
                "steps": f"{steps:,} of {size}",
                "learning rate": f"{arguments['learning_rate']:g}, weight decay {arguments['weight_decay']:g}",
                "precision": arguments["mixed_precision"],
                "seed": str(run["seed"]),
                "final losses": ", ".join(f"{key} {value:.4g}" for key, value in run["final_losses"].items()),
                "versions": ", ".join(f"{key} {value}" for key, value in run["versions"].items()),
            },
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishingError(f"{file} is not the result of a pre-training run: {error!r}.") from error


def _training_section(stages: list[dict[str, Any]]) -> str:
    """What the runs of pre-training did, one after the other; what all have in common is said once."""
    samples, seconds = (sum(stage[name] for stage in stages) for name in ("samples", "seconds"))
    shown = {
        "samples seen": f"{samples:,}",
        "time": f"{seconds / 60:,.0f} min, {samples / seconds:,.0f} samples/s",
    }
    for name in stages[0]["shown"]:
        values = [stage["shown"][name] for stage in stages]
        shown[name] = values[0] if len(set(values)) == 1 else "; then ".join(values)
    return "\n".join(["## Training", "", "| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in shown.items()), ""])


def _eval_results(result: TaskResult) -> list[EvalResult]:
    slug = dataset_name(result).replace(" ", "-").lower()
    return [
        EvalResult(
            task_type=_TASK_TYPES.get(result.task, "point-cloud-classification"),
            task_name=task_name(result),
            dataset_type=slug,
            dataset_name=dataset_name(result),
            dataset_config=task_name(result),  # the Hub groups by task type and data set; variants must stay apart
            dataset_split=result.settings["test_split"],
            metric_type=metric,
            metric_name=METRIC_NAMES.get(metric, metric.replace("_", "-")) + f" ({TASK_NAMES[result.task]})",
            metric_value=round(values["mean"], 2),
            metric_args={"deviation": values["deviation"], "seeds": result.seeds},
        )
        for metric, values in result.metrics.items()
    ]


def _check_weights(result: TaskResult, known: set[str]):
    """Refuses numbers of other weights than those known by their digests."""
    if result.model["initialization"] == "pretrained" and not _weights(result) & known:
        raise ResultError(
            f"the result of `{result.command}` was measured with other weights ({result.model['name']}) than those in "
            "the folder of the card."
        )


def _weights(result: TaskResult) -> set[str]:
    """The digests in a result: of the weights that it began with and, if tuned, of those that it ended with."""
    return {result.model["weights"], *result.model.get("final_weights", [])}


def _digests(model: PreTrainedModel) -> set[str]:
    return {weights_digest(model.base_model), weights_digest(model)}
