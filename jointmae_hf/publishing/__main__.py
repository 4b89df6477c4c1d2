"""Tables and model cards from result files.

    python -m jointmae_hf.publishing tables README.md kicad outputs
    python -m jointmae_hf.publishing card outputs/pretrain model_cards/joint-mae-tiny --repo_id org/joint-mae-tiny \\
        --license apache-2.0 --training outputs/pretrain/result.json --results outputs
    python -m jointmae_hf.publishing curve few_labels.png outputs/finetune-*/result.json
    python -m jointmae_hf.publishing report README.md pretrain outputs/pretrain/result.json

`tables` and `report` rewrite what stands in a file between `<!-- results:NAME -->` and `<!-- /results:NAME -->`, with
results of tasks or with what a pre-training run says of itself. `card` makes the folder of a released model from the
folder that training left. `curve` draws results with several `--train_fraction`.
"""

import argparse
import sys
from pathlib import Path

from ..evaluation.results import ResultError, read_results
from .cards import build_model_folder
from .curves import draw_label_curve
from .hub import PublishingError
from .tables import check_one_model, commands_table, report_table, results_table, rewrite_block


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m jointmae_hf.publishing", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tables = commands.add_parser("tables", help="rewrite a marked block of a Markdown file")
    tables.add_argument("file", type=Path)
    tables.add_argument("name", help="name of the block")
    tables.add_argument("results", nargs="+", help="result files, or folders of them")
    tables.add_argument("--headlines", action="store_true", help="one metric for each task")
    tables.add_argument("--commands", action="store_true", help="add the table of commands")
    report = commands.add_parser("report", help="rewrite a marked block with the report of a pre-training run")
    report.add_argument("file", type=Path)
    report.add_argument("name", help="name of the block")
    report.add_argument("run", type=Path, help="result.json of the run")
    curve = commands.add_parser("curve", help="draw one task against the number of labelled shapes")
    curve.add_argument("file", type=Path, help="picture to make")
    curve.add_argument("results", nargs="+", help="result files, or folders of them")
    card = commands.add_parser("card", help="make the folder of a released model")
    card.add_argument("source", type=Path, help="output folder of training")
    card.add_argument("output", type=Path, help="folder to make")
    card.add_argument("--half", action="store_true", help="round weights to float16; they are loaded as float32")
    card.add_argument("--repo_id", required=True, help="name on the Hub, owner/name")
    card.add_argument("--license", required=True, help="identifier of the Hub's list, such as apache-2.0")
    card.add_argument("--results", nargs="*", default=[], help="result files, or folders of them")
    card.add_argument(
        "--training", type=Path, nargs="+", default=[], help="result.json of each pre-training run, in their order"
    )
    card.add_argument("--notes", type=Path, help="Markdown to add: data licences, limits")
    card.add_argument("--attach", type=Path, nargs="*", default=[], help="licence and attribution files to add")
    card.add_argument("--base_model", help="what it was fine-tuned from")
    card.add_argument("--datasets", nargs="*", help="names on the Hub of the training data")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None):
    options = vars(parse_arguments(arguments))
    command = options.pop("command")
    results = read_results(options.pop("results", []))
    if command == "card":
        print(build_model_folder(options.pop("source"), options.pop("output"), results=results, **options))
        return
    if command == "curve":
        draw_label_curve(results, options["file"])
        return
    check_one_model(results)
    content = report_table(options["run"]) if command == "report" else results_table(results, options["headlines"])
    if options.get("commands"):
        content += "\n\n" + commands_table(results)
    from ..files import replace_text

    file = options["file"]
    replace_text(file, rewrite_block(file.read_text(encoding="utf-8"), options["name"], content))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ResultError, PublishingError) as error:
        sys.exit(f"error: {error}")
