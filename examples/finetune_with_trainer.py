"""Fine-tunes a classifier with transformers' own `Trainer`.

    python examples/finetune_with_trainer.py outputs/pretrain --epochs 10

Any class of this package trains this way. `examples/finetune_classification.py` is the one whose protocol is fixed and
whose results can be compared.
"""

import argparse
import os
from pathlib import Path

import datasets
import numpy as np
from transformers import Trainer, TrainingArguments, set_seed

from jointmae_hf import JointMAEForPointCloudClassification, JointMAEPointCloudProcessor


EMBEDDED_DATASET = Path(os.path.relpath(Path(__file__).parent / "data" / "kicad-parts"))


def accuracy(evaluation) -> dict[str, float]:
    return {"accuracy": 100 * float(np.mean(evaluation.predictions.argmax(-1) == evaluation.label_ids))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="pre-trained model: folder or name on the Hub")
    parser.add_argument("--dataset", default=str(EMBEDDED_DATASET), help="splits train and test of points and label")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/finetune_with_trainer")
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    shapes = datasets.load_dataset(arguments.dataset)
    names = shapes["train"].features["label"].names
    processor = JointMAEPointCloudProcessor.from_pretrained(arguments.model)
    model = JointMAEForPointCloudClassification.from_pretrained(
        arguments.model, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )

    def prepare(rows: dict) -> dict:
        return {**processor([np.asarray(points) for points in rows["points"]]), "labels": rows["label"]}

    trainer = Trainer(
        model,
        TrainingArguments(
            arguments.output_dir,
            num_train_epochs=arguments.epochs,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            remove_unused_columns=False,  # `prepare` reads them
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=shapes["train"].with_transform(prepare),
        eval_dataset=shapes["test"].with_transform(prepare),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
