# Sourced by the scripts that run several commands as one experiment, such as demo.sh, tiny_base.sh and study.sh.
#
# Expects RUN (the run folder). A part is a command with a name. $RUN/timeline.jsonl has one line for each part with its
# seconds; the report reads it.

TARGET=${CARGO_TARGET_DIR:-target}/release
RECTIFLOW=$TARGET/rectiflow
TIMELINE=$RUN/timeline.jsonl

# needs_built PROGRAM...: exits if a program is not built.
needs_built() {
    for program in "$@"; do
        if [ ! -x "$program" ]; then
            echo "$0: $program is not built yet; run make build" >&2
            exit 1
        fi
    done
}

# now: prints the seconds, as "1732320000.1" if date supports fractions.
now() {
    date +%s.%N | sed 's/\.N$//; s/\(\.[0-9]\).*/\1/'
}

# part NAME COMMAND...: runs a part, prints its name and command, and records its seconds.
part() {
    name=$1
    shift
    printf '\n== %s\n   %s\n' "$name" "$*"
    began=$(now)
    "$@" || {
        code=$?
        if [ "$code" -gt 128 ]; then
            printf '\nstopped in "%s"; run it again to continue\n' "$name" >&2
        else
            printf '\n"%s" failed (exit code %s); the message above says why\n' "$name" "$code" >&2
        fi
        exit "$code"
    }
    secs=$(echo "$(now) $began" | awk '{ printf "%.1f", $1 - $2 }')
    printf '   %s s\n' "$secs"
    printf '{"part": "%s", "secs": %s}\n' "$name" "$secs" >>"$TIMELINE"
}

# once MARK FILE NAME COMMAND...: a part whose result is kept. Creates MARK when it is done; repeats if FILE is newer.
once() {
    mark=$1 file=$2
    shift 2
    if [ -e "$mark" ] && [ -z "$(find "$file" -newer "$mark")" ]; then
        printf '\n== %s: done before\n' "$1"
    else
        part "$@"
        : >"$mark"
    fi
}

# newest_checkpoint RUN: prints the folder of the newest checkpoint.
newest_checkpoint() {
    ls -d "$1"/checkpoints/step-* | sort | tail -n 1
}

# The captioned pictures and their packed data set, which all experiments share. 128 subjects are held out of both.
emoji_dataset() {
    once runs/demo/.pictures assets/emoji/emoji.tar 'compose the captioned pictures' \
        "$TARGET/examples/emoji_pictures" assets/emoji/emoji.tar runs/demo/pictures \
        --backgrounds 4 --holdout-subjects 128
    once runs/demo/.dataset recipes/demo.toml 'prepare: buckets, VAE, packing' \
        "$RECTIFLOW" prep runs/demo/pictures/train --out runs/demo/dataset --vae assets/tiny-sdxl/vae \
        --recipe recipes/demo.toml
}

# The two committed bases, as diffusers folders: runs/demo/base, and runs/demo/base-shifted, which differs in its UNet
# and its schedule. The weights are compressed, because most rows of the token embeddings are zeros. The VAE is
# separate.
unpack_bases() {
    once runs/demo/.base assets/tiny-sdxl/base.tar.gz 'unpack the base models' unpack_both
}

unpack_both() {
    rm -rf runs/demo/base runs/demo/base-shifted && mkdir -p runs/demo/base &&
        tar -xzf assets/tiny-sdxl/base.tar.gz -C runs/demo/base &&
        cp -R assets/tiny-sdxl/vae runs/demo/base/ &&
        cp -R runs/demo/base runs/demo/base-shifted &&
        tar -xzf assets/tiny-sdxl/base-shifted.tar.gz -C runs/demo/base-shifted
}
