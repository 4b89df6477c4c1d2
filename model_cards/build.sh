#!/usr/bin/env bash
# How released models and all figures on their cards are made, from nothing: six hours on two CPU cores, and for
# `joint-mae-small` some minutes on a GPU (without one, a day) and an evening more.
#
#     bash model_cards/build.sh [ldraw_parts.npz]    # run again after an interruption, it goes on where it was
#
# The encoder is measured with the weights that are released: they are rounded first.
set -euo pipefail
cd "$(dirname "$0")/.."

RESULTS=outputs/results/downstream  # those of the released weights are in benchmarks/results
LDRAW=${1:-}

make --no-print-directory .venv/.train
source .venv/bin/activate
# 576,000 shapes, then 128,000 with twice the tokens, their views slightly turned. On the CPU, as it was, also where there is a GPU.
CUDA_VISIBLE_DEVICES= accelerate launch examples/pretrain.py --preset tiny --train_data procedural --max_steps 4500 --batch_size 128 \
    --mixed_precision bf16 --scale_min 0.8 --scale_max 1.25 --max_jitter 0.005 --save_steps 100 \
    --output_dir outputs/joint-mae-tiny --resume_from_checkpoint latest \
    --config_overrides "agreement_loss_weight=5,agreement_of_visible=false,pooling_deviation=true,pooling_layers=[2,4,6]"
CUDA_VISIBLE_DEVICES= accelerate launch examples/pretrain.py --model_name_or_path outputs/joint-mae-tiny --train_data procedural --seed 1 \
    --max_steps 1000 --batch_size 128 --learning_rate 5e-4 --mixed_precision bf16 --scale_min 0.8 --scale_max 1.25 --max_tilt 10 \
    --max_jitter 0.01 --save_steps 100 --config_overrides "num_centers=[512,64]" --output_dir outputs/joint-mae-tiny-fine \
    --resume_from_checkpoint latest
release() { # SOURCE NAME LICENSE ARGUMENTS...
    python -m jointmae_hf.publishing card "$1" "model_cards/$2" --half --repo_id "org/$2" --license "$3" "${@:4}"
}
release outputs/joint-mae-tiny-fine joint-mae-tiny apache-2.0

measure() { # NAME RESULTS TASKS...
    python benchmarks/downstream.py "model_cards/$1" --output "$2/kicad" --tasks "${@:3}"
    local sets=(examples/data/kicad-parts)
    if [ -n "$LDRAW" ]; then
        python benchmarks/downstream.py "model_cards/$1" --data "$LDRAW" --output "$2/ldraw" --tasks "${@:3}"
        sets+=("outputs/$(basename "$LDRAW" .npz)")
    fi
    python benchmarks/robustness.py "model_cards/$1" --datasets "${sets[@]}" --output "${2/downstream/robustness}.json" \
        --table "model_cards/notes/$1.md"
}
measure joint-mae-tiny "$RESULTS" linear_svm few_shot retrieval classification part_segmentation

release outputs/joint-mae-tiny-fine joint-mae-tiny apache-2.0 \
    --training outputs/joint-mae-tiny/result.json outputs/joint-mae-tiny-fine/result.json \
    --results "$RESULTS"/*/{linear_svm-*-1,few_shot-*,retrieval-*,classification-*-1,part_segmentation-*}.json \
    --notes model_cards/notes/joint-mae-tiny.md
head() { # RESULTS NAME: the model of seed 0
    release "outputs/downstream/joint-mae-tiny/kicad/$1/seed-0" "$2" cc-by-sa-4.0 --base_model org/joint-mae-tiny \
        --attach examples/data/kicad-parts/ATTRIBUTION.md \
        --results "$RESULTS/kicad/$1.json" "$RESULTS/kicad/${1/pretrained/scratch}.json" \
        "$RESULTS/kicad/${1/pretrained/forest}.json" --notes "model_cards/notes/$2.md"
}
head classification-pretrained-1 joint-mae-tiny-kicad-classification
head part_segmentation-pretrained joint-mae-tiny-kicad-segmentation

# 2,355,200 shapes, then 358,400 with twice the tokens, their views slightly turned. Without a GPU, leave out --compile and --cuda_graph.
accelerate launch examples/pretrain.py --preset small --train_data procedural --max_steps 4600 --batch_size 512 \
    --learning_rate 1.5e-3 --mixed_precision bf16 --compile --cuda_graph --num_workers 13 --scale_min 0.8 --scale_max 1.25 \
    --max_jitter 0.005 --grad_norm_steps 0 --output_dir outputs/joint-mae-small --resume_from_checkpoint latest --config_overrides \
    "num_centers=[256,128,32],agreement_loss_weight=5,agreement_of_visible=false,pooling_deviation=true,pooling_layers=[3,6,8],drop_path_rate=0"
accelerate launch examples/pretrain.py --model_name_or_path outputs/joint-mae-small --train_data procedural --seed 1 --max_steps 700 \
    --batch_size 512 --learning_rate 7e-4 --mixed_precision bf16 --cuda_graph --num_workers 13 --scale_min 0.8 --scale_max 1.25 \
    --max_tilt 10 --max_jitter 0.01 --grad_norm_steps 0 --config_overrides "num_centers=[512,256,64]" \
    --output_dir outputs/joint-mae-small-fine --resume_from_checkpoint latest
release outputs/joint-mae-small-fine joint-mae-small apache-2.0
measure joint-mae-small "${RESULTS}_small" linear_svm few_shot retrieval classification part_segmentation
release outputs/joint-mae-small-fine joint-mae-small apache-2.0 --training outputs/joint-mae-small/result.json outputs/joint-mae-small-fine/result.json \
    --results "${RESULTS}_small"/*/{linear_svm-*-1,few_shot-*,retrieval-*,classification-*-1,part_segmentation-*}.json \
    --notes model_cards/notes/joint-mae-small.md
