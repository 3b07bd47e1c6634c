#!/bin/sh
# Reproduces the experiments on text encoders, objectives and captions of docs/log.md: `make experiments`. Each run
# starts from the demo's base and sees the same samples. SAMPLES (16000) is the length of a run, SEEDS ("1 2") the list
# of seeds. Takes about a quarter of an hour on two cores. Results are in runs/experiments: measures.json,
# side-by-side.png, aligned-timesteps-SEED.txt, shuffled-captions.txt.
set -eu

RUN=runs/experiments
SAMPLES=${SAMPLES:-16000}
SEEDS=${SEEDS:-1 2}
. scripts/parts.sh
needs_built "$RECTIFLOW" "$TARGET/examples/emoji_pictures" "$TARGET/examples/demo_measure" \
    "$TARGET/examples/shuffled_captions" "$TARGET/examples/aligned_timesteps"
mkdir -p "$RUN" runs/demo

unpack_bases
emoji_dataset

# convert NAME SEED [OVERRIDE...]: runs the demo's recipe, shortened.
convert() {
    name=$1-$2 seed=$2
    shift 2
    once "$RUN/.$name" recipes/demo.toml "$name" \
        "$RECTIFLOW" train recipes/demo.toml --set run.dir="$RUN/$name" --set run.seed="$seed" \
        --set train.samples="$SAMPLES" --set preview.prompts=[] "$@"
}

set --
for seed in $SEEDS; do
    convert frozen "$seed"
    convert trained "$seed" --set train.text_encoders=trained --set lr.ratio.text_encoder=0.1 --set lr.ratio.text_encoder_2=0.1
    convert eps "$seed" --set objective.parameterization=eps
    for name in frozen trained eps; do
        set -- "$@" "$name, seed $seed=$(newest_checkpoint "$RUN/$name-$seed")"
    done
done

part 'measure' \
    "$TARGET/examples/demo_measure" "$RUN" --heldout runs/demo/pictures/heldout --vae assets/tiny-sdxl/vae \
    --pictures 128 --seeds 1 "base=runs/demo/base" "$@"

# The start of the conversion, with frequent tests.
for seed in $SEEDS; do
    part "timesteps of an eps model, seed $seed" sh -c '"$1" recipes/demo.toml run.seed="$2" train.samples="$3" \
        test.every_steps=25 preview.prompts=[] >"$4"' sh \
        "$TARGET/examples/aligned_timesteps" "$seed" "$((SAMPLES / 2))" "$RUN/aligned-timesteps-$seed.txt"
done

# A stretch in the middle, when the losses have settled. The guard is off, because it would rewind.
middle=$((SAMPLES / 64))
part 'captions of the wrong pictures' sh -c '"$1" recipes/demo.toml "$2" "$3" train.samples="$5" guard.enabled=false \
    preview.prompts=[] >"$4"' sh \
    "$TARGET/examples/shuffled_captions" "$((middle - 49))" "$((middle + 50))" "$RUN/shuffled-captions.txt" "$SAMPLES"

if "${PYTHON:-python3}" -c 'import matplotlib' 2>/dev/null; then
    "${PYTHON:-python3}" scripts/experiments_plot.py "$RUN" docs/experiments.png $SEEDS
else
    echo 'no matplotlib: docs/experiments.png is unchanged (set PYTHON to a Python that has it)'
fi
