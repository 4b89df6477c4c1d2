"""Pre-trains a Joint-MAE model.

    accelerate launch examples/pretrain.py
    accelerate launch examples/pretrain.py --dataset org/shapes --preset base --mixed_precision bf16 --batch_size 128
    accelerate launch examples/pretrain.py --resume_from_checkpoint latest

Without `--dataset` it trains on the data next to this script. `--help` lists all arguments.
"""

import logging
import os
from pathlib import Path

from transformers import HfArgumentParser

from jointmae_hf.training import PreTrainingArguments, pretrain


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))


def main():
    parser = HfArgumentParser(PreTrainingArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(dataset=str(EMBEDDED_DATASET))
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    pretrain(arguments)


if __name__ == "__main__":
    main()
