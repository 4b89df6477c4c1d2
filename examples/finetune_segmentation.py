"""Fine-tunes part segmentation and measures it on the test split.

    accelerate launch examples/finetune_segmentation.py --model_name_or_path outputs/pretrain --seeds 0 1 2
    accelerate launch examples/finetune_segmentation.py --model_name_or_path outputs/pretrain --from_scratch

Without `--dataset` it uses the data next to this script. `--help` lists all arguments.
"""

import logging
import os
from pathlib import Path

from transformers import HfArgumentParser

from jointmae_hf.evaluation.results import describe
from jointmae_hf.training.finetuning import finetune_segmentation
from jointmae_hf.training.finetuning_arguments import SegmentationArguments


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))


def main():
    parser = HfArgumentParser(SegmentationArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(dataset=str(EMBEDDED_DATASET))
    (arguments,) = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    result = finetune_segmentation(arguments)
    if result is not None:
        print(describe(result))


if __name__ == "__main__":
    main()
