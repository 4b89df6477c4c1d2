"""Builds a data set from what you have on disk, ready to load or to push to the Hub.

    python examples/build_dataset.py modelnet40 --source modelnet40_ply_hdf5_2048 --output modelnet40
    python examples/build_dataset.py scanobjectnn-pb-t50-rs --source h5_files --output scanobjectnn
    python examples/build_dataset.py folder --source my-shapes --output shapes --push_to_hub org/shapes
    python examples/build_dataset.py kicad --source /usr/share/kicad/3dmodels --output kicad-parts

The output folder is a Hub repository: parquet files, a card with the counts and a contact sheet.
`load_dataset("shapes")` reads it, and so does `examples/pretrain.py --dataset shapes`. A build that was stopped goes
on when it is started again.
"""

import argparse
import shutil
from pathlib import Path

from jointmae_hf.data.builders import SOURCES, build_dataset, open_source, push_to_hub, write_card
from jointmae_hf.data.builders.folder import open_folder


COMMON = {"num_points": None, "seed": 0}
TABLES = {"dtype": "float32", "rows_per_shard": 1024}
LICENSE = {"license": "unknown"}
KICAD = {"max_shapes": None, "max_per_class": None, "min_per_class": 20, "coordinate_bits": 10}
# Options with their defaults, by which builders take them.
GROUPS = {"all but kicad": TABLES, "folder": LICENSE, "kicad": {"doc": None, **KICAD}}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*SOURCES, "kicad"], help="what the source folder holds")
    parser.add_argument("--source", type=Path, required=True, help="folder of the data set, as it was published")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, a Hub repository in the making")
    parser.add_argument(
        "--num_points", type=int, help="points of each cloud (default: all of a cloud, 2048 of a mesh or KiCad part)"
    )
    parser.add_argument("--seed", type=int, default=COMMON["seed"])
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder as this data set")
    parser.add_argument("--public", action="store_true", help="make the new repository public; see the card's licence")

    # An option that was not given leaves no trace, so that one that was can be refused.
    tables, folder, kicad = (parser.add_argument_group(g, argument_default=argparse.SUPPRESS) for g in GROUPS)
    tables.add_argument("--dtype", choices=["float32", "float16"])
    tables.add_argument("--rows_per_shard", type=int)
    folder.add_argument("--license", help="licence of the shapes, an identifier of the Hub")
    kicad.add_argument(
        "--doc", type=Path, help="folder with the package's `copyright` and `changelog.Debian.gz`, when there is one"
    )
    kicad.add_argument("--max_shapes", type=int, help="thin out the largest classes until no more shapes remain")
    kicad.add_argument("--max_per_class", type=int)
    kicad.add_argument("--min_per_class", type=int)
    kicad.add_argument("--coordinate_bits", type=int, help="round coordinates to multiples of 2^-this")
    args = parser.parse_args()
    for group, options in GROUPS.items():
        for option, default in options.items():
            if group == args.name or (group == "all but kicad" and args.name != "kicad"):
                setattr(args, option, getattr(args, option, default))
            elif option in args:
                value = getattr(args, option)
                parser.error(f"`--{option}` is {value}, but `name` is {args.name}, expected {group}.")
    return args


def main() -> None:
    args = parse_args()
    (build_kicad if args.name == "kicad" else build_tables)(args)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.2f} MB")
    if args.push_to_hub:
        print(push_to_hub(args.output, args.push_to_hub, private=not args.public))


def build_tables(args: argparse.Namespace) -> None:
    is_folder = args.name == "folder"
    source = open_folder(args.source, args.license) if is_folder else open_source(args.name, args.source)
    chosen = {name: getattr(args, name) for name in (COMMON | TABLES)}
    report = build_dataset(source, args.output, num_workers=args.num_workers, **chosen)
    print(report)
    write_card(source, report, args.output, command_line(args, COMMON | TABLES | (LICENSE if is_folder else {})))


def build_kicad(args: argparse.Namespace) -> None:
    from jointmae_hf.data.kicad import build_kicad_dataset, write_splits
    from jointmae_hf.data.kicad_card import TITLE, package_version, write_card

    doc = args.doc or args.source.parent.parent / "doc" / "kicad-packages3d"
    copyright_file = doc / "copyright" if (doc / "copyright").exists() else None
    if copyright_file is None:
        print("No copyright file: models under the GPL are told by their own headers alone.")
    parts_folder, readme = args.output / ".parts", args.output / "README.md"
    is_own = parts_folder.exists() or (readme.exists() and TITLE in readme.read_text(encoding="utf-8"))
    if not is_own and any((args.output / name).exists() for name in ("README.md", "data")):
        raise ValueError(f"`output` is {str(args.output)!r}, which holds data of another origin; name a new folder.")
    dataset, report = build_kicad_dataset(
        args.source,
        num_points=args.num_points or 2048,
        copyright_file=copyright_file,
        num_workers=args.num_workers,
        parts_folder=parts_folder,
        seed=args.seed,
        **{name: getattr(args, name) for name in KICAD},
    )
    print(report)
    write_splits(dataset, args.output)
    write_card(dataset, report, args.output, command_line(args, COMMON | KICAD), package_version(doc))
    shutil.rmtree(parts_folder)


def command_line(args: argparse.Namespace, defaults: dict) -> str:
    """The command that makes these tables again: folders by their names, options that are not the default."""
    options = [f"--{name} {getattr(args, name)}" for name, value in defaults.items() if getattr(args, name) != value]
    folders = f"{args.name} --source {args.source.resolve().name} --output {args.output.resolve().name}"
    return " ".join(["python examples/build_dataset.py", folders, *options])


if __name__ == "__main__":
    main()
