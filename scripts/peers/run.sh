#!/bin/sh
# Compares with other programs: sh scripts/peers/run.sh PYTHON. Needs target/release/rectiflow, and a Python with the
# packages of scripts/golden/requirements.txt. Fails at the first comparison that is outside its tolerance.
set -eu
python=$1
rectiflow=target/release/rectiflow
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for prediction in flow epsilon v_prediction; do
    echo "== $prediction"
    "$python" scripts/peers/tiny_model.py "$work/$prediction" --vae assets/tiny-sdxl/vae --prediction $prediction
    "$rectiflow" export --model "$work/$prediction" --format diffusers --dtype fp32 --out "$work/$prediction-export"
    # --shift 6 is what `rectiflow export` configures the stock scheduler with.
    "$python" scripts/peers/diffusers_sample.py "$work/$prediction-export" --rectiflow "$rectiflow" --shift 6
    "$rectiflow" export --model "$work/$prediction" --format single-file --dtype fp32 --out "$work/$prediction.safetensors"
    "$python" scripts/peers/single_file.py "$work/$prediction.safetensors" "$work/$prediction-export"
done
