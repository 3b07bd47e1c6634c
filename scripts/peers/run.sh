#!/bin/sh
# Compares with other programs: sh scripts/peers/run.sh PYTHON. Needs target/release/rectiflow (or the program that
# RECTIFLOW names) and the Python of scripts/peers/environment.py. Stops at the first comparison outside its tolerance.
# Results go to standard output, raw timings to benches/runs/.
set -eu
python=$1
rectiflow=${RECTIFLOW:-target/release/rectiflow}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# For torch without CUDA's libraries: symbols are resolved when they are called.
export TORCH_USE_RTLD_GLOBAL=1

today=$(date -u +%F)
echo "$today, $("$rectiflow" --version), $(getconf _NPROCESSORS_ONLN) cores of$(sed -n 's/^model name[^:]*://p' /proc/cpuinfo | head -n 1)"
grep -E '^(torch|diffusers|transformers)==' scripts/peers/requirements.txt | tr '\n' ' '
echo

for prediction in flow epsilon v_prediction; do
    echo "== $prediction"
    model=$work/$prediction
    "$python" scripts/peers/tiny_model.py "$model" --vae assets/tiny-sdxl/vae --prediction $prediction
    "$rectiflow" export --model "$model" --format diffusers --dtype fp32 --out "$model-fp32" >/dev/null
    # `rectiflow export` configures the stock scheduler with --shift 6.
    "$python" scripts/peers/diffusers_sample.py "$model-fp32" --rectiflow "$rectiflow" --shift 6
done

for dtype in fp32 fp16 bf16; do
    echo "== single file in $dtype"
    "$rectiflow" export --model "$work/flow" --format diffusers --dtype $dtype --out "$work/flow-$dtype" >/dev/null
    "$rectiflow" export --model "$work/flow" --format single-file --dtype $dtype --out "$work/flow-$dtype.safetensors" >/dev/null
    "$python" scripts/peers/single_file.py "$work/flow-$dtype.safetensors" "$work/flow-$dtype"
done

echo "== speed of the tiny model"
"$python" scripts/peers/bench_sample.py "$work/flow-fp32" --rectiflow "$rectiflow" --pairs 3 --rounds 3 --steps 8 --batch 2 \
    --threads 1 --out "benches/runs/$today-sample/tiny-fp32.json"

echo "== 20 steps of training, against PyTorch and diffusers"
"$python" scripts/peers/bench_step.py --check --rectiflow "$rectiflow"
