#!/bin/sh
# Measures what richer captions are worth on the tiny model: `make captions-use`. A model made of templates
# (scripts/captions_server.py) captions the demo's pictures in three modes by `rectiflow caption`: short (name and
# background), phrases (and colours, shape and size, as tags are), long (the same and more in sentences). For each mode
# and seed the demo's UNet is converted to flow matching with text encoders that start from random weights, so that no
# kind of caption is known before. Seeds are paired: same order of pictures, same noise, other captions. SAMPLES (9600)
# is the length of a run, SEEDS ("1 2 3 4 5") the list of seeds. Results are in runs/captions-use: numbers.json, tables.md,
# and docs/captions-use.png. PYTHON needs NumPy, Pillow and matplotlib (.venv-loaders/bin/python).
set -eu

RUN=runs/captions-use
SAMPLES=${SAMPLES:-9600}
SEEDS=${SEEDS:-1 2 3 4 5}
PICTURES=${PICTURES:-96}
PYTHON=${PYTHON:-python3}
MODES='short phrases long'
. scripts/parts.sh
needs_built "$RECTIFLOW" "$TARGET/examples/emoji_pictures" "$TARGET/examples/demo_measure"
mkdir -p "$RUN" runs/demo

unpack_bases
emoji_dataset

cat >"$RUN/caption.toml" <<'END'
[caption]
servers = ["http://127.0.0.1:1/v1"]
requests = 8
max_side_px = 256
jpeg_quality = 95

[[caption.modes]]
name = "short"
prompt = "A short caption of {caption}."
temperature = 0.0

[[caption.modes]]
name = "phrases"
prompt = "A caption in phrases of {caption}."
temperature = 0.0

[[caption.modes]]
name = "long"
prompt = "A long caption of {caption}."
temperature = 0.0
END

# serve: starts the server and sets URL. It ends with this script.
serve() {
    rm -f "$RUN/port"
    "$PYTHON" scripts/captions_server.py "$RUN/port" &
    SERVER=$!
    trap 'kill "$SERVER" 2>/dev/null' EXIT
    while [ ! -s "$RUN/port" ]; do
        kill -0 "$SERVER" 2>/dev/null || { echo "$0: the server did not start; see above" >&2; exit 1; }
        sleep 0.2
    done
    URL=http://127.0.0.1:$(cat "$RUN/port")/v1
}
# caption MODE FOLDER: captions of a folder of the demo's pictures as RUN/MODE-FOLDER.parquet and .jsonl.
caption() {
    # Answers of an older captioner would be kept.
    [ "$RUN/$1-$2.parquet" -nt scripts/captions_server.py ] || rm -f "$RUN/$1-$2.parquet"
    once "$RUN/.$1-$2" scripts/captions_server.py "caption $2, $1" \
        "$RECTIFLOW" caption "runs/demo/pictures/$2" --recipe "$RUN/caption.toml" --set "caption.servers=[\"$URL\"]" \
        --mode "$1" --out "$RUN/$1-$2.parquet" --jsonl "$RUN/$1-$2.jsonl"
}
# The pictures without the captions that the demo has for them.
bare() {
    rm -rf "$RUN/bare" && mkdir -p "$RUN/bare" && ln runs/demo/pictures/train/*.png "$RUN/bare/"
}
# convert MODE SEED
convert() {
    once "$RUN/.$1-seed-$2" "$RUN/$1-dataset/manifest.json" "$1, seed $2" \
        "$RECTIFLOW" train recipes/demo.toml --set run.dir="$RUN/$1-$2" --set run.seed="$2" \
        --set data.path="$RUN/$1-dataset" --set train.samples="$SAMPLES" --set train.text_encoders=trained \
        --set 'model.random=["text_encoder", "text_encoder_2"]' --set test.every_steps=100 --set 'preview.prompts=[]' \
        --set checkpoint.every_steps=100000
}

serve
once "$RUN/.bare" runs/demo/pictures/train/metadata.jsonl 'pictures without captions' bare
for mode in $MODES; do
    caption "$mode" train
    caption "$mode" heldout
    once "$RUN/.$mode-heldout-folder" "$RUN/$mode-heldout.jsonl" "held-out pictures, $mode" \
        "$PYTHON" scripts/captions_heldout.py runs/demo/pictures/heldout "$RUN/$mode-heldout.jsonl" "$RUN/$mode-heldout"
    once "$RUN/.$mode-dataset" "$RUN/$mode-train.parquet" "prepare, $mode" \
        "$RECTIFLOW" prep "$RUN/bare" --out "$RUN/$mode-dataset" --vae assets/tiny-sdxl/vae --recipe recipes/demo.toml \
        --annotations "$RUN/$mode-train.parquet"
done

# A seed at a time, so that a run that is stopped has whole pairs.
for seed in $SEEDS; do
    for mode in $MODES; do
        convert "$mode" "$seed"
    done
done

# Each model with prompts as it was trained on, and all with short prompts, as users write them.
for mode in $MODES; do
    set --
    for seed in $SEEDS; do
        for other in $MODES; do
            if [ "$mode" = short ] || [ "$mode" = "$other" ]; then
                set -- "$@" "$other, seed $seed=$(newest_checkpoint "$RUN/$other-$seed")"
            fi
        done
    done
    mkdir -p "$RUN/measured-$mode"
    part "measure, prompts of the kind $mode" \
        "$TARGET/examples/demo_measure" "$RUN/measured-$mode" --heldout "$RUN/$mode-heldout" \
        --vae assets/tiny-sdxl/vae --pictures "$PICTURES" --seeds 1 --keep "$RUN/measured-$mode/kept" "$@"
done
"$PYTHON" scripts/captions_use_plot.py "$RUN" docs/captions-use.png $SEEDS
