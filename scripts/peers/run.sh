#!/bin/sh
# Compares with other programs: sh scripts/peers/run.sh PYTHON. Needs target/release/rectiflow (RECTIFLOW names another
# one) and a Python with the packages of scripts/golden/requirements.txt. Stops at the first comparison that is outside
# its tolerance.
set -eu
python=$1
rectiflow=${RECTIFLOW:-target/release/rectiflow}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for prediction in flow epsilon v_prediction; do
    echo "== $prediction"
    model=$work/$prediction
    "$python" scripts/peers/tiny_model.py "$model" --vae assets/tiny-sdxl/vae --prediction $prediction
    "$rectiflow" export --model "$model" --format diffusers --dtype fp32 --out "$model-fp32"
    # --shift 6 is what `rectiflow export` configures the stock scheduler with.
    "$python" scripts/peers/diffusers_sample.py "$model-fp32" --rectiflow "$rectiflow" --shift 6
done

for dtype in fp32 fp16 bf16; do
    echo "== single file in $dtype"
    "$rectiflow" export --model "$work/flow" --format diffusers --dtype $dtype --out "$work/flow-$dtype"
    "$rectiflow" export --model "$work/flow" --format single-file --dtype $dtype --out "$work/flow-$dtype.safetensors"
    "$python" scripts/peers/single_file.py "$work/flow-$dtype.safetensors" "$work/flow-$dtype"
done
