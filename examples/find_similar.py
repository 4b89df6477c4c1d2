"""Finds the shapes in a folder that are most like one shape.

    python examples/find_similar.py part.stl my-parts --model model_cards/joint-mae-tiny --picture similar.png
    python examples/find_similar.py part.stl my-parts --model org/joint-mae --index my-parts.safetensors

Any file that the processor reads will do, in the folder and below it. Files that cannot be read are named and passed
over. With `--index` features are kept, also when the run is stopped, and only files that are new or have changed, or
could not be read, are read again.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel

from jointmae_hf import JointMAEPointCloudProcessor
from jointmae_hf.data.builders.core import reason_unreadable
from jointmae_hf.evaluation.results import reading, weights_digest
from jointmae_hf.files import replace_file
from jointmae_hf.point_cloud_processing_joint_mae import FILE_SUFFIXES


def list_shapes(folder: Path) -> list[Path]:
    """All files in and below a folder, links followed, that may hold a shape, by name; hidden ones are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` {folder} is no folder.")
    paths, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            paths += [Path(place, name) for name in files if not name.startswith(".")]
        seen.add(real)
    paths = sorted(path for path in paths if path.suffix.lower() in FILE_SUFFIXES and path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"`folder` {folder} holds no file with one of the suffixes {', '.join(FILE_SUFFIXES)}."
        )
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
) -> Iterator[tuple[Path, list[int], torch.Tensor]]:
    """Each file that could be read, its stamp before that, and its features."""
    read, inputs = [], []
    for number, path in enumerate(tqdm(paths, unit="file", leave=False, disable=not paths), 1):
        try:
            found = (path, stamp(path))
            inputs.append(processor(path))
            read.append(found)
        except (OSError, ValueError) as error:
            name = str(path).encode(errors="backslashreplace").decode()
            tqdm.write(f"passed over: {name}: {reason_unreadable(error, path)}", file=sys.stderr)
        if read and (len(read) == batch_size or number == len(paths)):
            for (done, stamped), features in zip(read, embed(model, inputs), strict=True):
                yield done, stamped, features
            read, inputs = [], []


class Index:
    """Features of files, by path and stamp, of one model and one way to process. Without a file it lives in memory."""

    def __init__(self, file: Path | None, made_by: dict[str, str]):
        self.file, self.made_by = file, made_by
        self.features: dict[str, tuple[list[int], torch.Tensor]] = {}
        self.saved = time.monotonic()
        if file is None:
            return
        if file.is_dir():
            raise ValueError(f"`--index` {file} is a folder, expected a file.")
        if file.exists():
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
                if set(stored.keys()) != {"features", "files"}:
                    raise ValueError(f"`--index` {file} is no index of this program; name another file.")
                if metadata != made_by:
                    raise ValueError(f"`--index` {file} was made with another model or processor; name another file.")
                rows, files = stored.get_tensor("features"), json.loads(bytes(stored.get_tensor("files").tolist()))
            self.features = {name: (stamped, row) for (name, stamped), row in zip(files, rows, strict=True)}
        self.save()  # a file that cannot be written is better known now than in the end

    def find(self, path: Path) -> torch.Tensor | None:
        """The features of a file as it is now, or `None`."""
        stamped, features = self.features.get(str(path.resolve()), (None, None))
        return features if stamped is not None and stamped == stamp(path) else None

    def add(self, path: Path, stamped: list[int], features: torch.Tensor):
        """Keeps the features of a file; what was added is saved every minute."""
        self.features[str(path.resolve())] = (stamped, features)
        if time.monotonic() - self.saved > 60:
            self.save()

    def save(self):
        self.saved = time.monotonic()
        if self.file is None:
            return
        files = json.dumps([(name, stamped) for name, (stamped, _) in self.features.items()]).encode()
        rows = [row for _, row in self.features.values()]
        tensors = {
            "features": torch.stack(rows) if rows else torch.empty(0, 0),
            "files": torch.frombuffer(bytearray(files), dtype=torch.uint8),
        }
        replace_file(self.file, lambda partial: save_file(tensors, partial, self.made_by))


def similarities(query: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    """Cosine similarity of one shape `(width,)` with others `(n, width)`."""
    return torch.nn.functional.cosine_similarity(query[None], features).numpy()


def check_picture(file: Path):
    """Refuses a picture that could not be drawn in the end."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"`--picture` {file} has the suffix {file.suffix!r}, expected one of {', '.join(known)}.")


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
        text = text.encode(errors="backslashreplace").decode()
        axis.text(0.5, -0.02, text, ha="center", va="top", fontsize=7, transform=axis.transAxes, parse_math=False)
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
        if options.picture is not None:
            check_picture(options.picture)
        paths = list_shapes(options.folder)
        processor = JointMAEPointCloudProcessor.from_pretrained(options.model)
        model = AutoModel.from_pretrained(options.model).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        query = embed(model, [processor(options.query)])[0]
        settings = json.dumps(processor.to_dict(), sort_keys=True)
        how = json.dumps(reading(model.config.to_dict()))
        made_by = {"weights": weights_digest(model), "reading": how, "processor": settings}
        index = Index(options.index, made_by)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    gallery = {path: index.find(path) for path in paths}
    try:
        new = [path for path, features in gallery.items() if features is None]
        for path, stamped, features in embed_files(model, processor, new, options.batch_size):
            index.add(path, stamped, features)
            gallery[path] = features
    except ImportError as error:  # trimesh
        parser.error(str(error))
    finally:
        index.save()

    itself = options.query.resolve()
    gallery = {path: each for path, each in gallery.items() if each is not None and path.resolve() != itself}
    if not gallery:
        parser.error(f"`folder` {options.folder} holds no shape beside the query that can be read")
    likeness, paths = similarities(query, torch.stack(list(gallery.values()))), list(gallery)
    best = np.argsort(-likeness, kind="stable")[: options.top]
    for row in best:
        print(f"{likeness[row]:.3f}  {paths[row]}")
    if options.picture is not None:
        shown = [(f"{likeness[row]:.3f}\n{paths[row].relative_to(options.folder)}", paths[row]) for row in best]
        draw(processor, [(options.query.name, options.query), *shown], options.picture)


if __name__ == "__main__":
    main()
