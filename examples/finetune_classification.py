"""Fine-tunes a classifier and measures it on the test split.

    accelerate launch examples/finetune_classification.py --model_name_or_path outputs/pretrain --seeds 0 1 2
    accelerate launch examples/finetune_classification.py --model_name_or_path outputs/pretrain --from_scratch
    accelerate launch examples/finetune_classification.py --baseline random_forest --train_fraction 0.1 --seeds 0 1 2
    accelerate launch examples/finetune_classification.py --model_name_or_path outputs/pretrain --head linear
    accelerate launch examples/finetune_classification.py --model_name_or_path outputs/pretrain --train_fraction 0.1
    accelerate launch examples/finetune_classification.py --model_name_or_path outputs/pretrain \\
        --validation_fraction 0 --ways 5 --shots 10 --queries 10 --seeds 0 1 2 3 4 5 6 7 8 9

Without `--dataset` it uses the data next to this script. `--help` lists all arguments.
"""

import logging
import os
from pathlib import Path

from transformers import HfArgumentParser

from jointmae_hf.evaluation.results import describe
from jointmae_hf.training.finetuning import finetune_classification
from jointmae_hf.training.finetuning_arguments import ClassificationArguments


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))


def main():
    parser = HfArgumentParser(ClassificationArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(dataset=str(EMBEDDED_DATASET))
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    result = finetune_classification(arguments)
    if result is not None:
        print(describe(result))


if __name__ == "__main__":
    main()
