"""Measures frozen features by K-way N-shot classification.

    python examples/few_shot.py --model_name_or_path outputs/pretrain --ways 5 --shots 10 --queries 10
    python examples/few_shot.py --baseline random_forest --ways 10 --shots 20 --queries 10

Without `--dataset` it uses the data next to this script. `--help` lists all arguments.
"""

import logging
import os
from pathlib import Path

from transformers import HfArgumentParser

from jointmae_hf.evaluation.results import describe
from jointmae_hf.evaluation.tasks import FewShotArguments, evaluate_few_shot


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))


def main():
    parser = HfArgumentParser(FewShotArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(dataset=str(EMBEDDED_DATASET))
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    result = evaluate_few_shot(arguments)
    if result is not None:
        print(describe(result))


if __name__ == "__main__":
    main()
