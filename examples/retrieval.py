"""Measures frozen features by shape retrieval.

    python examples/retrieval.py --model_name_or_path outputs/pretrain
    python examples/retrieval.py --model_name_or_path org/joint-mae --dataset org/shapes --gallery train

Without `--dataset` it uses the data next to this script. `--help` lists all arguments.
"""

import logging
import os
from pathlib import Path

from transformers import HfArgumentParser

from jointmae_hf.evaluation.results import describe
from jointmae_hf.evaluation.tasks import RetrievalArguments, evaluate_retrieval


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))


def main():
    parser = HfArgumentParser(RetrievalArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(dataset=str(EMBEDDED_DATASET))
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    result = evaluate_retrieval(arguments)
    if result is not None:
        print(describe(result))


if __name__ == "__main__":
    main()
