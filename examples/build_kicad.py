"""Builds a data set of labelled point clouds from KiCad's 3D library, ready to load or to push to the Hub.

    python examples/build_kicad.py --library /usr/share/kicad/3dmodels --output kicad-parts

The output folder is a Hub repository: parquet files, the card with the counts, a contact sheet and the attribution
that the licence asks for. `load_dataset("kicad-parts")` reads it. The models come with KiCad (Debian:
`kicad-packages3d`).
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi

from jointmae_hf.data.kicad import build_kicad_dataset, write_parquet
from jointmae_hf.data.kicad_card import package_version, write_card


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="KiCad's 3dmodels folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, a Hub repository in the making")
    parser.add_argument(
        "--doc", type=Path, help="folder with the package's `copyright` and `changelog.Debian.gz`, when there is one"
    )
    parser.add_argument("--num_points", type=int, default=2048)
    parser.add_argument("--max_shapes", type=int, help="thin out the largest classes until no more shapes remain")
    parser.add_argument("--max_per_class", type=int)
    parser.add_argument("--min_per_class", type=int, default=20)
    parser.add_argument("--coordinate_bits", type=int, default=10, help="round coordinates to multiples of 2^-this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload the folder as this data set")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    doc = args.doc or args.library.parent.parent / "doc" / "kicad-packages3d"
    copyright_file = doc / "copyright" if (doc / "copyright").exists() else None
    if copyright_file is None:
        print("No copyright file: models under the GPL are told by their own headers alone.")
    dataset, report = build_kicad_dataset(
        args.library,
        num_points=args.num_points,
        seed=args.seed,
        max_shapes=args.max_shapes,
        max_per_class=args.max_per_class,
        min_per_class=args.min_per_class,
        coordinate_bits=args.coordinate_bits,
        copyright_file=copyright_file,
        num_workers=args.num_workers,
    )
    print(report)
    write_parquet(dataset, args.output)
    write_card(dataset, report, args.output, command_line(args), package_version(doc))
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {dict(dataset.num_rows)}, {size / 1e6:.2f} MB")
    if args.push_to_hub:
        api = HfApi()
        api.create_repo(args.push_to_hub, repo_type="dataset", exist_ok=True)
        print(api.upload_folder(repo_id=args.push_to_hub, folder_path=args.output, repo_type="dataset"))


def command_line(args: argparse.Namespace) -> str:
    """The command that makes these clouds, with the folders as a Debian system has them."""
    options = ("num_points", "max_shapes", "max_per_class", "min_per_class", "coordinate_bits", "seed")
    chosen = " ".join(f"--{name} {getattr(args, name)}" for name in options if getattr(args, name) is not None)
    folders = f"--library /usr/share/kicad/3dmodels --output {args.output.name}"
    return f"python examples/build_kicad.py {folders} \\\n    {chosen}"


if __name__ == "__main__":
    main()
