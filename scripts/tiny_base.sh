#!/bin/sh
# Trains and packs the demo's two base models, from its pictures to assets/tiny-sdxl/base.tar.gz and
# base-shifted.tar.gz, with recipes/tiny-base.toml and recipes/tiny-base-shifted.toml. `make tiny-base` builds the
# programs. A second run continues where the first one stopped.
set -eu

RUN=runs/tiny-base
SHIFTED=runs/tiny-base-shifted
. scripts/parts.sh
needs_built "$RECTIFLOW" "$TARGET/examples/emoji_pictures"
mkdir -p "$RUN" runs/demo

# export_fp16 RUN OUT: exports the newest checkpoint of RUN.
export_fp16() {
    "$RECTIFLOW" export --model "$(newest_checkpoint "$1")" --format diffusers --dtype fp16 --out "$2"
}

# The base with latents of eight times the magnitude; the rest of the VAE is the same.
enlarge_latents() {
    rm -rf "$RUN/large-latents" && cp -R "$RUN/export" "$RUN/large-latents" &&
        cp assets/tiny-sdxl/vae/*.safetensors "$RUN/large-latents/vae/" &&
        sed 's/0\.13025/1.042/' "$RUN/export/vae/config.json" >"$RUN/large-latents/vae/config.json" &&
        grep -q '1\.042' "$RUN/large-latents/vae/config.json"
}

# Packs its UNet and the configuration of its VAE; the rest is the base's.
pack_shifted() {
    tar --sort=name --owner=0 --group=0 --mtime=@0 -C "$SHIFTED/export" -cf - unet vae/config.json |
        gzip -9n >assets/tiny-sdxl/base-shifted.tar.gz
}

emoji_dataset
once "$RUN/.trained" recipes/tiny-base.toml 'train the base' \
    "$RECTIFLOW" train recipes/tiny-base.toml
part 'export the base' export_fp16 "$RUN" "$RUN/export"
part 'pack the base' \
    "${PYTHON:-python3}" scripts/pack_tiny_base.py "$RUN/export" "$(newest_checkpoint "$RUN")" \
    assets/tiny-sdxl/base.tar.gz
once "$RUN/.large-latents" "$RUN/.trained" 'enlarge its latents' enlarge_latents
once "$RUN/.shifted" recipes/tiny-base-shifted.toml 'train the shifted base' \
    "$RECTIFLOW" train recipes/tiny-base-shifted.toml
part 'export the shifted base' export_fp16 "$SHIFTED" "$SHIFTED/export"
part 'pack what differs' pack_shifted
