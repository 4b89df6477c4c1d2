"""Pre-trains a Joint-MAE model.

    accelerate launch examples/pretrain.py
    accelerate launch examples/pretrain.py --dataset org/shapes --preset base --mixed_precision bf16 --batch_size 128
    accelerate launch examples/pretrain.py --train_data procedural:0.8,kicad:0.2 --max_steps 5000
    accelerate launch examples/pretrain.py --resume_from_checkpoint latest

Without `--dataset` it trains, and reports, on the data next to this script, which `--train_data` calls `kicad`.
`--help` lists all arguments.
"""

import logging
import os
from pathlib import Path

from transformers import HfArgumentParser

from jointmae_hf.data.mixture import parse_mixture
from jointmae_hf.training import PreTrainingArguments, pretrain


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))
EMBEDDED_NAME = "kicad"


def name_embedded_dataset(train_data: str) -> str:
    """`NAME:WEIGHT,...` with the path of the embedded data in place of its short name."""
    weights = parse_mixture(train_data)
    paths = {EMBEDDED_NAME: str(EMBEDDED_DATASET)}
    return ",".join(f"{paths.get(name, name)}:{weight}" for name, weight in weights.items())


def main():
    parser = HfArgumentParser(PreTrainingArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(dataset=str(EMBEDDED_DATASET))
    (arguments,) = parser.parse_args_into_dataclasses()
    if arguments.train_data is not None:
        arguments.train_data = name_embedded_dataset(arguments.train_data)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    pretrain(arguments)


if __name__ == "__main__":
    main()
