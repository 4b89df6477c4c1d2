#!/usr/bin/env bash
# From nothing to a model and its downstream table: virtual environment, packages, pre-training, report.
#
#     bash examples/speedrun.sh                              # on GPUs the paper's size, else `tiny` on the CPU
#     bash examples/speedrun.sh --max_steps 500 --seed 1     # any argument of pretrain.py replaces the recipe's
#     VENV=/path/to/venv OUTPUT=outputs/mine bash examples/speedrun.sh
#
# Run again after an interruption, it goes on where it was. The last lines are the table; it and everything else about
# the run is in result.json.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
OUTPUT=${OUTPUT:-outputs/speedrun}
make --no-print-directory "$VENV/.train" VENV="$VENV"

if "$VENV/bin/python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
    # The paper's size on 12.6 million shapes; `batch_size` counts over all GPUs.
    RECIPE=(--preset base --mixed_precision bf16 --compile --batch_size 512 --max_steps 24609 --ema_decay 0.9995)
else
    # About 35 minutes on two cores that do 80 samples a second.
    RECIPE=(--preset tiny --batch_size 16 --max_steps 10000 --save_steps 1000 --ema_decay 0.999)
fi
"$VENV/bin/accelerate" launch examples/pretrain.py --train_data procedural:0.8,kicad:0.2 "${RECIPE[@]}" \
    --output_dir "$OUTPUT" --resume_from_checkpoint latest "$@"
