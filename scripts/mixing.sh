#!/bin/sh
# Measures what the order of samples is worth. The tiny model is converted to flow matching in three orders, on the same
# pictures with the same seeds and budget: `local`, `window`, and a bad one. The bad one is `window` over rows sorted by
# background, with small windows of which few are open at a time. `make mixing` builds the programs. Takes ten minutes
# on two quiet cores. The plot needs matplotlib (PYTHON=.venv-loaders/bin/python). Numbers go to
# runs/mixing/SAMPLES/mixing.json, the curves to docs/mixing.png.
#
#     sh scripts/mixing.sh [SAMPLES] [SEED...]        6400 samples and seeds 1 2 3 by default
set -eu

RUN=runs/mixing
. scripts/parts.sh
needs_built "$RECTIFLOW" "$TARGET/examples/emoji_pictures" "$TARGET/examples/sort_rows"
mkdir -p "$RUN" runs/demo
SAMPLES=${1:-6400}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- 1 2 3
RUNS=$RUN/$SAMPLES
mkdir -p "$RUNS"

unpack_bases
emoji_dataset
sorted() {
    rm -rf "$RUN/sorted" && "$TARGET/examples/sort_rows" runs/demo/dataset "$RUN/sorted"
}
once "$RUN/.sorted" runs/demo/dataset/manifest.json 'sort the rows of a copy' sorted

# order NAME SEED DATASET MODE WINDOW LANES
order() {
    once "$RUNS/.$1-$2" recipes/demo.toml "$1, seed $2" \
        "$RECTIFLOW" train recipes/demo.toml --set run.dir="$RUNS/$1-$2" --set run.seed="$2" --set data.path="$3" \
        --set train.mode="$4" --set train.window_samples="$5" --set train.lanes="$6" \
        --set train.samples="$SAMPLES" \
        --set test.every_steps=25 --set "preview.prompts=[]" --set checkpoint.every_steps=100000
}
for seed in "$@"; do
    order local "$seed" runs/demo/dataset local 2048 2
    order window "$seed" runs/demo/dataset window 512 2
    order bad "$seed" "$RUN/sorted" window 128 1
done
"${PYTHON:-python3}" scripts/mixing_plot.py "$RUNS" docs/mixing.png "$@"
