#!/bin/bash
# rectiflow prep on Slurm: three jobs, each of which starts when the one before it has ended well.
#
#     SOURCE=/shared/pictures OUT=/shared/dataset VAE=/shared/sdxl bash launch/prep-slurm.sh 16 [OPTIONS OF RECTIFLOW PREP]
#
# 1. `facts`: an array of 16 tasks without GPU; each reads its share of the pictures for their hashes and sizes.
# 2. `objects`: an array of 16 tasks with a GPU; each encodes its share.
# 3. `join`: the data set of what all have written. A URL as OUT is sent here (--work names the shared folder).
#
# OUT, or --work, must be on a file system that all machines share, with locks (flock). Tasks need not run at the same
# time. A task that fails is put back into the queue MAX_RESTARTS (3) times, and goes on where it was.
# `make slurm-prep` runs it under Slurm.
set -eu

if [ -z "${PREP_STAGE:-}" ]; then
    : "${SOURCE:?the pictures}" "${OUT:?the data set}" "${VAE:?the VAE}"
    workers=${1:?the number of workers}
    shift
    last=$((workers - 1))
    submit() {
        export PREP_STAGE=$1
        shift
        sbatch --parsable --requeue --open-mode=append "$@"
    }
    facts=$(submit facts --job-name=prep-facts --array="0-$last" --output=prep-facts-%a.log \
        --cpus-per-task="${CPUS_PER_TASK:-12}" "$0" "$@")
    objects=$(submit objects --job-name=prep-objects --array="0-$last" --output=prep-objects-%a.log \
        --dependency="afterok:$facts" --kill-on-invalid-dep=yes --cpus-per-task="${CPUS_PER_TASK:-12}" \
        ${GPUS---gpus-per-task=1 --ntasks=1} "$0" "$@")
    join=$(submit join --job-name=prep-join --output=prep-join.log \
        --dependency="afterok:$objects" --kill-on-invalid-dep=yes --cpus-per-task="${CPUS_PER_TASK:-12}" "$0" "$@")
    echo "facts $facts, objects $objects, join $join"
    exit
fi

part=()
device=(--device "${DEVICE:-cuda}")
case $PREP_STAGE in
    facts) part=(--worker "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT") device=() ;;
    objects) part=(--worker "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT") ;;
    join) device=() ;;
esac
status=0
rectiflow prep "$SOURCE" --out "$OUT" --vae "$VAE" --stage "$PREP_STAGE" "${part[@]}" "${device[@]}" "$@" || status=$?

# Exit code 2: the settings cannot work. Anything else may pass: a preemption, a lost GPU, a full disk.
if [ "$status" -ne 0 ] && [ "$status" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-3}" ]; then
    echo "failed with $status: back into the queue"
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
