#!/bin/sh
# The demo: converts a tiny SDXL, trained to predict noise, to flow matching, and measures both side by side.
# Samples, both exports and a report go to runs/demo.
#
# `make demo` builds the programs and runs this script from the repository's root. A second run continues where the
# first one stopped: pictures, data set and finished training are kept; measures, samples, exports and report are
# recomputed. `make clean-demo` removes all of it.
set -eu

RUN=runs/demo
RECIPE=recipes/demo.toml
. scripts/parts.sh
needs_built "$RECTIFLOW" "$TARGET/examples/emoji_pictures" "$TARGET/examples/demo_measure"
mkdir -p "$RUN"

unpack_bases
emoji_dataset
once "$RUN/.trained" "$RECIPE" 'convert to flow matching' \
    "$RECTIFLOW" train "$RECIPE"

CHECKPOINT=$(newest_checkpoint "$RUN")
part 'measure base and result' \
    "$TARGET/examples/demo_measure" "$RUN" --heldout "$RUN/pictures/heldout" --vae assets/tiny-sdxl/vae --pictures 96 \
    "base=$RUN/base" "shifted base=$RUN/base-shifted" "base, sampled as flow=$RUN/base@flow" "converted=$CHECKPOINT"
rm -rf "$RUN/samples"
part 'sample' \
    "$RECTIFLOW" sample --model "$CHECKPOINT" --prompts recipes/demo-prompts.txt --size 128x128 --batch 4 --seed 1 \
    --shift 3 --cfg 3 --out "$RUN/samples"
part 'export for diffusers' \
    "$RECTIFLOW" export --model "$CHECKPOINT" --format diffusers --out "$RUN/export/diffusers"
part 'export for ComfyUI' \
    "$RECTIFLOW" export --model "$CHECKPOINT" --format single-file --out "$RUN/export/tiny-sdxl-flow.safetensors"
part 'write the report' "$RECTIFLOW" report "$RUN"

cat <<END

The demo is done:
  $RUN/report.html               pictures, numbers, curves, times: open it in a browser
  $RUN/samples/grid.png          a fixed set of prompts, four pictures each
  $RUN/export/                   the model for diffusers and for ComfyUI
  $RUN/dataset                   the packed data set: rectiflow inspect $RUN/dataset --prompts 10
END
