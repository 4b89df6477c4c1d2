"""Finds the shapes in a folder that are most like one shape.

    python examples/find_similar.py part.stl my-parts --model model_cards/joint-mae-tiny --picture similar.png
    python examples/find_similar.py part.stl my-parts --model org/joint-mae --index my-parts.safetensors

Any file that the processor reads will do, in the folder and below it. Files that cannot be read are named and passed
over. With `--index` features are kept, also when the run is stopped, and only files that are new or have changed are
read again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel

from jointmae_hf import JointMAEPointCloudProcessor
from jointmae_hf.data.builders.core import reason_unreadable, replace_file
from jointmae_hf.evaluation.results import weights_digest
from jointmae_hf.point_cloud_processing_joint_mae import ARRAY_SUFFIXES, MESH_SUFFIXES, TEXT_SUFFIXES


SUFFIXES = (*ARRAY_SUFFIXES, *TEXT_SUFFIXES, *MESH_SUFFIXES)


def list_shapes(folder: Path) -> list[Path]:
    """All files in and below a folder that may hold a shape, by name; hidden ones are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` {folder} is no folder.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise FileNotFoundError(f"`folder` {folder} holds no file with one of the suffixes {', '.join(SUFFIXES)}.")
    return paths


def stamp(path: Path) -> list[int]:
    """What changes when a file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def embed(model: PreTrainedModel, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Features `(clouds, width)` of clouds that were processed one by one."""
    points = torch.cat([each["point_values"] for each in inputs])
    real = torch.ones(1, points.shape[1], dtype=torch.bool)
    mask = torch.cat([each.get("point_mask", real) for each in inputs])
    with torch.inference_mode():
        outputs = model(points.to(model.device), point_mask=None if mask.all() else mask.to(model.device))
    return outputs.pooler_output.float().cpu()


def embed_files(
    model: PreTrainedModel, processor: JointMAEPointCloudProcessor, paths: list[Path], batch_size: int
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Files that could be read and their features, some at a time."""
    read, inputs = [], []
    for path in tqdm(paths, unit="file", leave=False):
        try:
            inputs.append(processor(path))
            read.append(path)
        except (OSError, ValueError) as error:
            tqdm.write(f"passed over: {path}: {reason_unreadable(error, path)}", file=sys.stderr)
        if len(read) == batch_size:
            yield read, embed(model, inputs)
            read, inputs = [], []
    if read:
        yield read, embed(model, inputs)


class Index:
    """Features of files, by path and stamp, of one model and one way to process."""

    def __init__(self, file: Path | None, made_by: dict[str, str]):
        self.file, self.made_by = file, made_by
        self.features: dict[str, tuple[list[int], torch.Tensor]] = {}
        if file is not None and file.exists():
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
                if "files" not in metadata:
                    raise ValueError(f"`--index` {file} is no index of this program; name another file.")
                if not made_by.items() <= metadata.items():
                    raise ValueError(f"`--index` {file} was made with another model or processor; name another file.")
                files, rows = json.loads(metadata["files"]), stored.get_tensor("features")
            self.features = {name: (stamp, row) for (name, stamp), row in zip(files, rows, strict=True)}

    def find(self, path: Path) -> torch.Tensor | None:
        """The features of a file as it is now, or `None`."""
        found = self.features.get(str(path.resolve()))
        return found[1] if found is not None and found[0] == stamp(path) else None

    def add(self, path: Path, features: torch.Tensor):
        self.features[str(path.resolve())] = (stamp(path), features)

    def save(self):
        if self.file is None or not self.features:
            return
        files = [(name, stamp) for name, (stamp, _) in self.features.items()]
        rows = torch.stack([row for _, row in self.features.values()])
        metadata = {**self.made_by, "files": json.dumps(files)}
        replace_file(self.file, lambda partial: save_file({"features": rows}, partial, metadata))


def similarities(query: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    """Cosine similarity of one shape `(width,)` with others `(n, width)`."""
    return torch.nn.functional.cosine_similarity(query[None], features).numpy()


def draw(processor: JointMAEPointCloudProcessor, shapes: list[tuple[str, Path]], file: Path):
    """A picture of shapes with a text below each, the first one in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from jointmae_hf.visualization import scatter_cloud

    columns = min(len(shapes), 6)
    rows = -(-len(shapes) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (text, path) in zip(axes.flat, shapes, strict=False):
        color = "#d0721c" if axis is axes[0, 0] else "#2f6f9f"
        scatter_cloud(axis, processor(path)["point_values"][0].numpy(), color)
        axis.text(0.5, -0.02, text, ha="center", va="top", fontsize=7, transform=axis.transAxes)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("query", type=Path, help="file of the shape to look for")
    parser.add_argument("folder", type=Path, help="folder to look in")
    parser.add_argument("--model", default="org/joint-mae", help="pre-trained model: a folder, or a name on the Hub")
    parser.add_argument("--top", type=int, default=10, help="how many to show")
    parser.add_argument("--batch_size", type=int, default=32, help="shapes at a time")
    parser.add_argument("--index", type=Path, help="file that keeps the features, safetensors")
    parser.add_argument("--picture", type=Path, help="picture of the query and of what was found, to make")
    options = parser.parse_args()
    for name in ("top", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"`--{name}` is {getattr(options, name)}, expected at least 1")

    try:
        paths = list_shapes(options.folder)
        processor = JointMAEPointCloudProcessor.from_pretrained(options.model)
        model = AutoModel.from_pretrained(options.model).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        query = embed(model, [processor(options.query)])[0]
        settings = json.dumps(processor.to_dict(), sort_keys=True)
        index = Index(options.index, {"weights": weights_digest(model), "processor": settings})
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        parser.error(str(error))
    try:
        new = [path for path in paths if index.find(path) is None]
        for found, features in embed_files(model, processor, new, options.batch_size):
            for path, row in zip(found, features, strict=True):
                index.add(path, row)
    except ImportError as error:  # trimesh
        parser.error(str(error))
    finally:
        index.save()

    gallery = [path for path in paths if index.find(path) is not None and path.resolve() != options.query.resolve()]
    if not gallery:
        parser.error(f"`folder` {options.folder} holds no shape beside the query that can be read")
    likeness = similarities(query, torch.stack([index.find(path) for path in gallery]))
    best = np.argsort(-likeness, kind="stable")[: options.top]
    for row in best:
        print(f"{likeness[row]:.3f}  {gallery[row]}")
    if options.picture is not None:
        shown = [(f"{likeness[row]:.3f}\n{gallery[row].relative_to(options.folder)}", gallery[row]) for row in best]
        draw(processor, [(options.query.name, options.query), *shown], options.picture)


if __name__ == "__main__":
    main()
