#!/usr/bin/env bash
# torchrun of PyTorch 2.13.0: `--shutdown-timeout 60` holds if torchrun itself gets SIGTERM, and not
# if one process fails: then the others get SIGTERM and, 30 seconds later, SIGKILL, whatever the
# option says. (The agent's _stop_workers, also called for a restart, passes no time-out on.) Two
# processes, of which rank 0 needs 35 seconds to save on SIGTERM: with SIGTERM of torchrun it saves,
# after the end of rank 1 it is killed while it saves.
#
# Needs python3 with venv, a C compiler, readelf, 530 MB to download. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    torch==2.13.0 numpy==2.4.6 typing_extensions==4.16.0 sympy==1.14.0 mpmath==1.4.1 networkx==3.6.1 \
    Jinja2==3.1.6 MarkupSafe==3.0.4 fsspec==2026.9.0 filelock==4.2.12 setuptools==80.9.0 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85

# The wheel is built for CUDA. Empty shared objects stand in for the 4 GB of CUDA libraries, which
# nothing here calls; symbols are then resolved when they are called (TORCH_USE_RTLD_GLOBAL).
lib=$(echo "$folder"/env/lib/python*/site-packages/torch/lib)
for needed in $(readelf -d "$lib"/lib*.so* 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(lib\(cu\|nv\|nccl\).*\)\]/\1/p' | sort -u); do
    if ! find "$lib/../.." -name "$needed" | grep -q .; then
        cc -shared "-Wl,-soname,$needed" -x c /dev/null -o "$lib/$needed"
    fi
done

cat >"$folder/worker" <<'SH'
#!/bin/bash
# Rank 1 fails if it is asked to, rank 0 saves on SIGTERM.
if [ "$RANK" = 1 ]; then
    if [ -n "$FAILS" ]; then sleep 2; exit 1; fi
    exec sleep 600
fi
terminated=
trap 'terminated=1' TERM
echo "rank 0: started"
until [ -n "$terminated" ]; do sleep 0.2; done
echo "rank 0: SIGTERM, saving for 35 s"
end=$(($(date +%s) + 35))
while [ "$(date +%s)" -lt $end ]; do sleep 0.2; done
echo "rank 0: saved"
exit 143
SH
chmod +x "$folder/worker"
export TORCH_USE_RTLD_GLOBAL=1 OMP_NUM_THREADS=1
"$folder/env/bin/python" -c 'import torch; print("torch", torch.__version__)'
run=("$folder/env/bin/torchrun" --standalone --nproc-per-node 2 --shutdown-timeout 60 --no-python "$folder/worker")

echo "SIGTERM of torchrun:"
FAILS='' "${run[@]}" >"$folder/terminated" 2>"$folder/errors" &
launcher=$!
until grep -q started "$folder/terminated"; do kill -0 $launcher; sleep 0.2; done
kill -TERM $launcher
status=0; wait $launcher || status=$?
cat "$folder/terminated"
echo "torchrun exits with $status"
grep -q "rank 0: saved" "$folder/terminated"

echo "rank 1 exits with 1:"
status=0; FAILS=1 "${run[@]}" >"$folder/failed" 2>"$folder/errors" || status=$?
cat "$folder/failed"
grep -o "Unable to shutdown process.*" "$folder/errors"
echo "torchrun exits with $status"
grep -q "rank 0: SIGTERM" "$folder/failed"
if grep -q "rank 0: saved" "$folder/failed"; then exit 1; fi
