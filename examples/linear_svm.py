"""Measures frozen features by a linear SVM.

    python examples/linear_svm.py --model_name_or_path outputs/pretrain
    python examples/linear_svm.py --model_name_or_path outputs/pretrain --untrained --seeds 0 1 2
    python examples/linear_svm.py --baseline random_forest --seeds 0 1 2
    python examples/linear_svm.py --model_name_or_path outputs/pretrain --train_fraction 0.1 --seeds 0 1 2

Without `--dataset` it uses the data next to this script. `--help` lists all arguments.
"""

import logging
import os
from pathlib import Path

from transformers import HfArgumentParser

from jointmae_hf.evaluation.results import describe
from jointmae_hf.evaluation.tasks import LinearSvmArguments, evaluate_linear_svm


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))


def main():
    parser = HfArgumentParser(LinearSvmArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(dataset=str(EMBEDDED_DATASET))
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    result = evaluate_linear_svm(arguments)
    if result is not None:
        print(describe(result))


if __name__ == "__main__":
    main()
