#!/bin/sh
# The demo's full comparison: both bases, the flow model that each is converted to, and a flow model from random weights
# with the same budget, on three seeds. `make study` builds the programs. Takes about half an hour on two cores. Results
# are in runs/study: measures.json, report.html, and every measured picture in runs/study/kept.
set -eu

RUN=runs/study
. scripts/parts.sh
needs_built "$RECTIFLOW" "$TARGET/examples/emoji_pictures" "$TARGET/examples/demo_measure"
mkdir -p "$RUN" runs/demo

unpack_bases
emoji_dataset

# convert NAME BASE [OVERRIDE...]: runs the demo's recipe from another base.
convert() {
    name=$1 base=$2
    shift 2
    once "$RUN/.$name" recipes/demo.toml "$name" \
        "$RECTIFLOW" train recipes/demo.toml --set run.dir="$RUN/$name" --set model.base="$base" "$@"
}
# The shifted base's UNet on latents of the usual magnitude: flow does not need larger ones.
usual_latents() {
    rm -rf "$RUN/base-shifted" && cp -R runs/demo/base-shifted "$RUN/" &&
        cp assets/tiny-sdxl/vae/config.json "$RUN/base-shifted/vae/"
}

convert converted runs/demo/base
once "$RUN/.usual-latents" assets/tiny-sdxl/vae/config.json 'rescale the shifted latents' usual_latents
convert shifted-converted "$RUN/base-shifted"
convert scratch assets/tiny-sdxl --set train.text_encoders=trained \
    --set 'model.random=["unet", "text_encoder", "text_encoder_2"]'

part 'measure' \
    "$TARGET/examples/demo_measure" "$RUN" --heldout runs/demo/pictures/heldout --vae assets/tiny-sdxl/vae \
    --pictures 128 --seeds 3 --keep "$RUN/kept" \
    "from scratch=$(newest_checkpoint "$RUN/scratch")" \
    "base, sampled as flow=runs/demo/base@flow" \
    "base=runs/demo/base" \
    "converted=$(newest_checkpoint "$RUN/converted")" \
    "shifted base=runs/demo/base-shifted" \
    "shifted, converted=$(newest_checkpoint "$RUN/shifted-converted")"
