#!/usr/bin/env bash
# Makes the packaged model from Flickr8k: run.sh FLICKR8K WORK. It can be interrupted and started again; completed
# stages are skipped.
set -euo pipefail
data=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")
recipe=$(realpath "$(dirname "$0")")
cd "$recipe/../.."

[ -e "$work/dev.jsonl" ] || python -m recipes.flickr8k.prepare --data "$data" --output "$work"
[ -e "$work/vision" ] || python -m recipes.build_tower --train "$work/train.jsonl" --dev "$work/dev.jsonl" --output "$work"
[ -e "$work/language-model" ] || python -m recipes.language_model --text "$work/text.txt" --dev "$work/dev.jsonl" \
    --output "$work" --vocab-size 6000 --epochs 8 --dropout 0.3 --bf16
resume=()
[ ! -e "$work/adapters/last" ] || resume=(--resume)
itune-train --preset small-data --data "$work/train.jsonl" --dev-data "$work/dev.jsonl" --dev-images 300 \
    --language-model "$work/language-model" --vision "$work/vision" --cache-features "$work/features" \
    --lower --strip-period --heads 4 --bottleneck 256 --epochs 12 --batch-size 160 --learning-rate 1e-3 \
    --num-beams 3 --max-new-tokens 24 --output "$work/adapters" "${resume[@]}"
for precision in fp32 int8; do
    # The last epoch: `best` was chosen on 300 photos; on all 1,000, the last one is as good or better.
    [ -e "$work/bundle-$precision" ] || itune-export "$work/adapters/last" --target onnx --precision "$precision" \
        --name itune-flickr8k --num-beams 5 --max-new-tokens 24 --length-penalty 0.8 \
        --license "$(cat "$recipe/weights-license.txt")" --model-card "$recipe/model-card.md" --output "$work/bundle-$precision"
    itune-eval "$work/bundle-$precision" --data "$data" --split dev --output "$work/dev-$precision.json"
done
