"""The card and the contact sheet of a built data set; every number in them is counted from the finished tables."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ...files import replace_text
from ...visualization import scatter_cloud
from ..loading import clouds_from_arrow
from .core import BUILD_FILE, BuildReport, ShapeSource


PART_COLORS = ("#3b4252", "#e0932f", "#d64550", "#49a6c9", "#4f9d69")
_CLOUD_COLOR = "#2f6f9f"
# The card names so many of the shapes that were left out; `build.json` has all.
_MAX_LISTED = 20

CARD = """---
license: {license}
pretty_name: {pretty_name}
size_categories:
- {size_category}
task_categories:
- other
tags:
- point-cloud
- 3d
- point-cloud-classification{more_tags}
configs:
- config_name: default
  description: {fingerprint}
  data_files:
{data_files}
---

# {title}

{num_shapes:,} point clouds in {num_classes} classes. {description}{homepage}

![Two shapes of each of some classes](contact_sheet.png)

```python
from datasets import load_dataset

shapes = load_dataset("path/to/this/folder").with_format("numpy")
points = shapes["{first_split}"][0]["points"]  # ({num_points}, 3), in the unit sphere
```

| column | type | meaning |
|---|---|---|
| `points` | {dtype} `({num_points}, 3)` | centred on their mean, the farthest at distance 1 |
{part_column}| `label` | class label | the class, numbered in the order of the table below |
| `name` | string | where the shape comes from in its source |

## Splits

| class |{split_names}
|---|{split_rules}
{class_rows}

## How it was made

```
{command}
```

{left_out}

## Licence

{license_note}
"""


def write_card(source: ShapeSource, report: BuildReport, output: str | Path, command: str) -> None:
    """
    Writes `README.md` and `contact_sheet.png` beside the tables of a build.

    Args:
        source: what was built.
        report: what became of it.
        output: the folder that [`build_dataset`] wrote.
        command: what makes it again.
    """
    output = Path(output)
    tables = {split: sorted((output / "data").glob(f"{split}-*-of-*.parquet")) for split in report.num_rows}
    labels = {split: _read_labels(paths) for split, paths in tables.items()}
    first = next(iter(tables))
    examples = choose_examples(labels[first])
    shapes = {source.class_names[c]: [_read_shape(tables[first], i) for i in rows] for c, rows in examples.items()}
    draw_contact_sheet(shapes, output / "contact_sheet.png", source.part_names)
    text = CARD.format(**_describe(source, report, tables, labels, command))
    replace_text(output / "README.md", text)


def choose_examples(labels: np.ndarray, num_classes: int = 20, shapes_per_class: int = 2) -> dict[int, np.ndarray]:
    """Rows to show, by class: classes and their rows evenly spread, so that neighbours are not all there is to see."""
    classes = np.unique(labels)
    num_classes = min(num_classes, len(classes))
    chosen = classes[np.linspace(0, len(classes) - 1, num_classes).round().astype(int)]
    members = {int(label): np.flatnonzero(labels == label) for label in chosen}
    spread = np.linspace(0, 1, shapes_per_class)
    return {c: rows[np.unique(((len(rows) - 1) * spread).astype(int))] for c, rows in members.items()}


def draw_contact_sheet(
    shapes: dict[str, Sequence[tuple[np.ndarray, np.ndarray | None]]],
    path: str | Path,
    part_names: Sequence[str] | None = None,
) -> None:
    """
    A picture of shapes seen from above at an angle, points coloured by part.

    Args:
        shapes: clouds `(n, 3)` in the unit sphere and the part of each point `(n,)` or `None`, by class.
        path: the PNG file to write.
        part_names: names for the legend; many parts, as those of many classes are, have none.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from PIL import Image
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "jointmae-hf[train]".') from error

    shapes_per_class = max(map(len, shapes.values()))
    num_rows, num_columns = -(-len(shapes) // 4), 4 * shapes_per_class
    figure = Figure(figsize=(num_columns * 1.3, num_rows * 1.48))
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for (name, clouds), group in zip(shapes.items(), axes.reshape(-1, shapes_per_class), strict=False):
        for axis, (points, parts) in zip(group, clouds, strict=False):
            colors = _CLOUD_COLOR if parts is None else np.array(PART_COLORS)[np.asarray(parts) % len(PART_COLORS)]
            scatter_cloud(axis, points, colors)
        group[0].set_title(name, loc="left", fontsize=8, parse_math=False)
    if part_names is not None and len(part_names) <= len(PART_COLORS):
        handles = [Line2D([], [], marker="o", linestyle="", color=color) for color in PART_COLORS[: len(part_names)]]
        legend = figure.legend(
            handles, part_names, loc="lower center", ncols=len(part_names), frameon=False, fontsize=9
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    margin = 0.15 / num_rows  # 0.03 of a sheet of five rows
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - margin, bottom=margin * 5 / 3, wspace=0, hspace=0.2)
    figure.savefig(path, dpi=110, facecolor="white")
    Image.open(path).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def fingerprint(paths: Iterable[Path]) -> str:
    """
    A checksum of files, for the header of a card.

    `datasets` finds a local folder with a card in its cache by the folder's name and that header; without this, it
    would give the tables of another folder of that name, or older ones.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"


def _read_labels(paths: Sequence[Path]) -> np.ndarray:
    import pyarrow.parquet as pq

    return np.concatenate([pq.read_table(path, columns=["label"])["label"].to_numpy() for path in paths])


def _read_shape(paths: Sequence[Path], row: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Points and parts of one row of a table in several files, without reading the others."""
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row < size:
                    table = file.read_row_group(group).slice(row, 1)
                    parts = table["part_labels"][0].as_py() if "part_labels" in table.column_names else None
                    return clouds_from_arrow(table["points"])[0], parts if parts is None else np.array(parts)
                row -= size
    raise IndexError("beyond the last row")


def _describe(
    source: ShapeSource,
    report: BuildReport,
    tables: dict[str, list[Path]],
    labels: dict[str, np.ndarray],
    command: str,
) -> dict[str, str | int]:
    import pyarrow.parquet as pq

    schema = pq.read_schema(next(iter(tables.values()))[0])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    size = features["points"]["shape"][0] or "n"
    total = sum(report.num_rows.values())
    counts = {split: Counter(rows.tolist()) for split, rows in labels.items()}
    rows = [(name, *(c[i] for c in counts.values())) for i, name in enumerate(source.class_names)]
    rows.append(("**all**", *(c.total() for c in counts.values())))
    if source.official_sizes:
        rows.append(("official", *(source.official_sizes.get(split, "") for split in counts)))
    part_column = ""
    if source.part_names is not None:
        names = ", ".join(source.part_names)
        part_column = f"| `part_labels` | {size} class labels | {names} |\n"
    return {
        "license": source.license,
        "pretty_name": json.dumps(source.pretty_name, ensure_ascii=False),
        "title": source.pretty_name,
        "size_category": _size_category(total),
        "more_tags": "\n- part-segmentation" if source.part_names is not None else "",
        "data_files": "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in tables),
        "fingerprint": fingerprint(path for paths in tables.values() for path in paths),
        "num_shapes": total,
        "num_classes": len(source.class_names),
        "description": source.description,
        "homepage": f" Published at <{source.homepage}>." if source.homepage else "",
        "first_split": next(iter(tables)),
        "num_points": size,
        "dtype": features["points"]["dtype"],
        "part_column": part_column,
        "split_names": "".join(f" {split} |" for split in counts),
        "split_rules": "---:|" * len(counts),
        "class_rows": "\n".join(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows),
        "command": command,
        "left_out": _left_out(report),
        "license_note": source.license_note,
    }


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value.replace("|", "\\|")


def _left_out(report: BuildReport) -> str:
    if not report.unreadable:
        return "All shapes of the source could be read."
    lines = [f"- `{name}`: {reason}" for name, reason in list(report.unreadable.items())[:_MAX_LISTED]]
    more = len(report.unreadable) - len(lines)
    if more:
        lines.append(f"- and {more:,} more, see `{BUILD_FILE}`")
    return "\n".join([f"Left out, as they could not be read: {len(report.unreadable):,}.", "", *lines])


def _size_category(count: int) -> str:
    """The Hub's name for the order of magnitude."""
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if count < limit:
            return name
    return "1M<n<10M"
