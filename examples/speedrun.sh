#!/usr/bin/env bash
# From nothing to a model and its downstream table: virtual environment, packages, pre-training, report.
#
#     bash examples/speedrun.sh                              # on GPUs the paper's size, else `tiny` on the CPU
#     bash examples/speedrun.sh --max_steps 500 --seed 1     # arguments of pretrain.py replace the recipe's
#     VENV=/path/to/venv OUTPUT=outputs/mine bash examples/speedrun.sh
#
# Run again after an interruption, it goes on where it was. The last lines are the table, which is in table.md, too: the
# frozen features beside those of the same network untrained and a random forest on shape histograms, on KiCad parts. The
# results that it is made of are in downstream, those of pre-training in result.json.
set -euo pipefail
cd "$(dirname "$0")/.."

for argument in "$@"; do
    case $argument in
        --output_dir | --output_dir=*) echo "error: name the folder as OUTPUT=... before the command" >&2 && exit 2 ;;
    esac
done
VENV=${VENV:-.venv}
OUTPUT=${OUTPUT:-outputs/speedrun}
make --no-print-directory "$VENV/.train" VENV="$VENV"

# The recipe of the released models, a third as long: procedural shapes, the losses of the paper, and agreement of two
# views. Features are read from three depths of the encoder. `model_cards/build.sh` has what else they had.
COMMON=(--train_data procedural --scale_min 0.8 --scale_max 1.25)
CONFIG=agreement_loss_weight=5,agreement_of_visible=false,pooling_deviation=true
DEVICE=$("$VENV/bin/python" -c "
import torch
capable = torch.cpu.get_capabilities()
in_hardware = capable.get('avx512_bf16') or capable.get('amx_bf16')
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print('gpus' if gpus > 1 else 'gpu' if gpus else 'cpu-bf16' if in_hardware else 'cpu')")
case $DEVICE in
    # The paper's size on 12.6 million shapes; `batch_size` counts over all GPUs.
    gpu | gpus)
        RECIPE=(--mixed_precision bf16 --compile --preset base --batch_size 512 --max_steps 24609) LAYERS=[4,8,12]
        [ "$DEVICE" = gpus ] || RECIPE+=(--cuda_graph) ;; # of one process alone
    # About half an hour on two cores that do 120 samples a second; without bfloat16 in hardware, twice that.
    cpu-bf16) RECIPE=(--mixed_precision bf16 --preset tiny --batch_size 128 --max_steps 1500) LAYERS=[2,4,6] ;;
    cpu) RECIPE=(--preset tiny --batch_size 128 --max_steps 1500) LAYERS=[2,4,6] ;;
    *) exit 1 ;;
esac
"$VENV/bin/accelerate" launch examples/pretrain.py "${COMMON[@]}" "${RECIPE[@]}" \
    --config_overrides "$CONFIG,pooling_layers=$LAYERS" --save_steps 100 \
    --output_dir "$OUTPUT" --resume_from_checkpoint latest "$@"

"$VENV/bin/python" benchmarks/downstream.py "$OUTPUT" --tasks linear_svm few_shot retrieval --output "$OUTPUT/downstream"
echo "<!-- results:speedrun --><!-- /results:speedrun -->" > "$OUTPUT/table.md"
"$VENV/bin/python" -m jointmae_hf.publishing tables "$OUTPUT/table.md" speedrun "$OUTPUT/downstream" --headlines
cat "$OUTPUT/table.md"
