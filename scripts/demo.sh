#!/bin/sh
# The demo: captioned pictures in, a trained tiny SDXL, samples, both exports and a report out, all in runs/demo.
#
# `make demo` builds what this needs and runs it from the repository's root. Run again it goes on where it was stopped:
# pictures, data set and finished training are kept, samples, exports and report are made anew. `make clean-demo` starts
# over. How long each part took is in runs/demo/timeline.jsonl, one line a part.
set -eu

RUN=runs/demo
RECIPE=recipes/demo.toml
TARGET=${CARGO_TARGET_DIR:-target}/release
RECTIFLOW=$TARGET/rectiflow
TIMELINE=$RUN/timeline.jsonl

for program in "$RECTIFLOW" "$TARGET/examples/emoji_pictures"; do
    if [ ! -x "$program" ]; then
        echo "demo: $program is not built yet; run: make demo" >&2
        exit 1
    fi
done
mkdir -p "$RUN"

# seconds, as "1732320000.1" where date knows fractions
now() {
    date +%s.%N | sed 's/\.N$//; s/\(\.[0-9]\).*/\1/'
}

# part NAME COMMAND...: runs a part of the demo, says so, and notes how long it took.
part() {
    name=$1
    shift
    printf '\n== %s\n   %s\n' "$name" "$*"
    began=$(now)
    "$@" || {
        code=$?
        if [ "$code" -gt 128 ]; then
            printf '\ndemo: stopped in "%s"; run it again to go on\n' "$name" >&2
        else
            printf '\ndemo: "%s" failed (exit code %s); the message above says why\n' "$name" "$code" >&2
        fi
        exit "$code"
    }
    secs=$(echo "$(now) $began" | awk '{ printf "%.1f", $1 - $2 }')
    printf '   %s s\n' "$secs"
    printf '{"part": "%s", "secs": %s}\n' "$name" "$secs" >>"$TIMELINE"
}

# once MARK NAME COMMAND...: a part whose result is kept: MARK is made when it is done. Done again if the recipe changed.
once() {
    mark=$1
    shift
    if [ -e "$mark" ] && [ -z "$(find "$RECIPE" -newer "$mark")" ]; then
        printf '\n== %s: done before\n' "$1"
    else
        part "$@"
        : >"$mark"
    fi
}

newest_checkpoint() {
    ls -d "$RUN"/checkpoints/step-* | sort | tail -n 1
}

once "$RUN/.pictures" 'compose the captioned pictures' \
    "$TARGET/examples/emoji_pictures" assets/emoji/emoji.tar "$RUN/pictures"
once "$RUN/.dataset" 'prepare: buckets, VAE, packing' \
    "$RECTIFLOW" prep "$RUN/pictures/train" --out "$RUN/dataset" --vae assets/tiny-sdxl/vae --recipe "$RECIPE"
once "$RUN/.trained" 'train by flow matching' \
    "$RECTIFLOW" train "$RECIPE"

CHECKPOINT=$(newest_checkpoint)
rm -rf "$RUN/samples"
part 'sample' \
    "$RECTIFLOW" sample --model "$CHECKPOINT" --prompts recipes/demo-prompts.txt --size 128x128 --batch 4 --seed 1 \
    --out "$RUN/samples"
part 'export for diffusers' \
    "$RECTIFLOW" export --model "$CHECKPOINT" --format diffusers --out "$RUN/export/diffusers"
part 'export for ComfyUI' \
    "$RECTIFLOW" export --model "$CHECKPOINT" --format single-file --out "$RUN/export/tiny-sdxl-flow.safetensors"
part 'write the report' "$RECTIFLOW" report "$RUN"

cat <<END

The demo is done:
  $RUN/report.html               pictures, curves, times: open it in a browser
  $RUN/samples/grid.png          a fixed set of prompts, four pictures each
  $RUN/export/                   the model for diffusers and for ComfyUI
  $RUN/dataset                   the packed data set: rectiflow inspect $RUN/dataset --prompts 10
END
