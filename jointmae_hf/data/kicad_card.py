"""The card, the attribution and the contact sheet of a data set built by `jointmae_hf.data.kicad`.

Every number in them is counted from the finished tables, so a card cannot disagree with its data.
"""

import gzip
from collections import Counter
from pathlib import Path

import datasets
import numpy as np

from .builders.card import choose_examples, draw_contact_sheet, fingerprint
from .kicad import PART_NAMES, KicadReport


TITLE = "# KiCad parts"
CARD = """---
license: cc-by-sa-4.0
pretty_name: KiCad parts
size_categories:
- 1K<n<10K
task_categories:
- other
tags:
- point-cloud
- 3d
- point-cloud-classification
- part-segmentation
- self-supervised-learning
- electronics
- kicad
configs:
- config_name: default
  description: {fingerprint}
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: test
    path: data/test-*.parquet
---

{title}

{num_shapes:,} electronic components from KiCad's 3D library in {num_classes} classes, each a cloud of {num_points:,}
points sampled from its surface, every point labelled with the part of the component it lies on.

![Two shapes of each of some classes, points coloured by part](contact_sheet.png)

```python
from datasets import load_dataset

parts = load_dataset("path/to/this/folder").with_format("numpy")
points = parts["train"][0]["points"]  # ({num_points}, 3), in the unit sphere
```

| column | type | meaning |
|---|---|---|
| `points` | float16 `({num_points}, 3)` | centred on their mean, the farthest at distance 1; z is up from the board |
| `part_labels` | {num_points} class labels | {part_names} |
| `label` | class label | the class of the part |
| `name`, `library` | string | the model's file and folder in KiCad's library |
| `family` | string | the class and the name without its numbers; the unit of the split |

**The points of a cloud are ordered** (by part, then along a Morton curve, which makes files smaller). Draw a random
subset, or shuffle, before you feed fewer than all of them to anything: half of the rows is half of the shape.

## Splits

| class | train | test | families in train | families in test |
|---|---:|---:|---:|---:|
{class_rows}

Whole name families go to one side, so a header with 5 pins is never in `train` while the same header with 6 is in
`test`.

| part | share of all points | shapes that have it |
|---|---:|---:|
{part_rows}

{multi_part} of the shapes have more than one part.

## How it was made

```
{command}
```

Source: {source}, {num_files:,} models. Left out of them:

- {num_gpl:,} under the GPL;
- {num_unreadable:,} that could not be read;
- {num_duplicates:,} near-duplicates of another one in their class;
- {num_small:,} of classes with fewer than {min_per_class} shapes;
- {num_beyond_limit:,} chosen at random from the largest classes, to balance them or to fit a size.

Points are spread evenly over the surface area; coordinates are rounded to multiples of 2^-{coordinate_bits}. Each
cloud depends on the seed and its own name alone, so other files and their order change nothing.

## Limits

- Part labels follow the material names of the models, as their authors chose them: metal is what carries a pin or
  metal material, glass is LED lenses and glass, label is printed marks, board is circuit board, body is all the rest.
- The models are drawings, not scans: no noise, no occlusion, and inner faces are sampled like outer ones.
- Size is lost in the normalisation; two parts that differ in scale alone count as duplicates.
- Where a family is more than half of its class, it is divided by the first measurement in the name: such parts of
  neighbouring sizes (a disc of 12 mm and one of 14 mm) can be on both sides.
- Some classes have few families on one side; a score there rests on few distinct designs. See the table.

## Licence

CC-BY-SA 4.0, as the models themselves; [ATTRIBUTION.md](ATTRIBUTION.md) names the holders and the changes.
"""

ATTRIBUTION = """# Attribution

These point clouds are adapted from the KiCad packages3D library by the KiCad library authors
(<https://gitlab.com/kicad/libraries/kicad-packages3D>). Source: {source}.

Copyright of the models, by number of shapes: {holders}.

Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC-BY-SA 4.0),
<https://creativecommons.org/licenses/by-sa/4.0/legalcode>, with this exception of KiCad's for the original models:

> To the extent that the creation of electronic designs that use 'Licensed Material' can be considered to be 'Adapted
> Material', then the copyright holder waives article 3 of the license with respect to these designs and any generated
> files which use data provided as part of the 'Licensed Material'.

The exception does not cover redistributing the collection, so these clouds stay under CC-BY-SA 4.0 and so does
anything adapted from them. The licence of the code that made them does not apply to them.

Changes: {num_shapes:,} of {num_files:,} models were chosen (models under the GPL, near-duplicates and rare classes
left out); each surface was sampled at {num_points:,} points, centred, scaled to the unit sphere and rounded;
materials were mapped to {num_parts} part labels, and classes and splits were added. The models come without warranty
of any kind.
"""


def write_card(
    dataset: datasets.DatasetDict, report: KicadReport, folder: str | Path, command: str, source: str
) -> None:
    """Writes `README.md`, `ATTRIBUTION.md` and `contact_sheet.png` into `folder`, beside the tables.

    `command` is what makes the set again, `source` names the package the models came in.
    """
    folder = Path(folder)
    rows = dataset["train"].with_format("numpy")
    examples = choose_examples(np.array(rows["label"]))
    names = rows.features["label"].names
    shapes = {
        names[c]: [(rows[i]["points"], rows[i]["part_labels"]) for i in map(int, r)] for c, r in examples.items()
    }
    draw_contact_sheet(shapes, folder / "contact_sheet.png", PART_NAMES)
    facts = describe(dataset, report, command, source)
    facts["fingerprint"] = fingerprint(folder / "data" / f"{split}-00000-of-00001.parquet" for split in dataset)
    (folder / "README.md").write_text(CARD.format(title=TITLE, **facts), encoding="utf-8")
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(**facts), encoding="utf-8")


def describe(dataset: datasets.DatasetDict, report: KicadReport, command: str, source: str) -> dict[str, str | int]:
    """What the card and the attribution state, counted from the finished tables."""
    class_names = dataset["train"].features["label"].names
    labels = {split: Counter(rows["label"]) for split, rows in dataset.items()}
    families = {split: Counter(f.split("/")[0] for f in set(rows["family"])) for split, rows in dataset.items()}
    counts = [
        (name, *(c[i] for c in labels.values()), *(c[name] for c in families.values()))
        for i, name in enumerate(class_names)
    ]
    counts.append(("**all**", *(c.total() for c in (*labels.values(), *families.values()))))
    parts = np.concatenate([rows.with_format("numpy")["part_labels"][:] for rows in dataset.values()])
    part_rows = [
        f"| {name} | {100 * (parts == i).mean():.2f} % | {(parts == i).any(axis=1).sum():,} |"
        for i, name in enumerate(PART_NAMES)
    ]
    holders = [f"{holder} ({count:,})" for holder, count in report.copyright_holders.items()]
    return {
        "num_shapes": report.num_shapes,
        "num_classes": len(class_names),
        "num_points": dataset["train"].features["points"].shape[0],
        "num_parts": len(PART_NAMES),
        "part_names": ", ".join(PART_NAMES),
        "class_rows": "\n".join(f"| {' | '.join(map(str, row))} |" for row in counts),
        "multi_part": f"{100 * report.multi_part_share:.1f} %",
        "part_rows": "\n".join(part_rows),
        "command": command,
        "source": source,
        "num_files": report.num_files,
        "num_gpl": report.num_gpl,
        "num_unreadable": len(report.unreadable),
        "num_duplicates": report.num_duplicates,
        "num_small": sum(report.small_classes.values()),
        "min_per_class": report.min_per_class,
        "num_beyond_limit": report.num_beyond_limit,
        "coordinate_bits": report.coordinate_bits,
        "holders": "; ".join(holders) or "see the headers of the original files",
    }


def package_version(doc: Path) -> str:
    """The Debian package and its version, from the first line of its changelog."""
    changelog = doc / "changelog.Debian.gz"
    if not changelog.exists():
        return "the 3D models of a KiCad installation"
    with gzip.open(changelog, "rt", encoding="utf-8") as file:
        package, version = file.readline().split()[:2]
    return f"Debian package `{package}` {version.strip('()')}"
