#!/usr/bin/env bash
# bitsandbytes 0.50.2 on the CPU: AdamW8bit keeps each moment in 8 bits with one scale for a block of
# 256 values. Where one gradient of a block is 10,000 times the others, the squares of those are 1e-8
# of the largest. They are stored as the smallest value that is not 0, which is 1,500 times too
# large, and from the second update on their parameters move by 2 to 3% of AdamW's step: they stand
# still. The first update is right, and without the one large gradient all are. No error, no warning.
#
# Needs python3 with venv, a C compiler, readelf, 600 MB to download. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    bitsandbytes==0.50.2 packaging==26.3 torch==2.13.0 numpy==2.4.6 typing_extensions==4.16.0 \
    sympy==1.14.0 mpmath==1.4.1 networkx==3.6.1 \
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

TORCH_USE_RTLD_GLOBAL=1 "$folder/env/bin/python" - <<'PY'
import bitsandbytes
import torch

RATE = 1e-3


def movement(kind, spike, updates):
    """How far the parameters with small gradients move, in learning rates."""
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = kind([parameter], lr=RATE, weight_decay=0.0)
    gradient = torch.full((4096,), 1e-4)
    gradient[::256] = spike
    for _ in range(updates):
        parameter.grad = gradient.clone()
        optimizer.step()
    return -parameter.detach()[1::256].mean().item() / RATE


print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
found = {}
for kind in (torch.optim.AdamW, bitsandbytes.optim.AdamW8bit):
    for spike in (1e-4, 1.0):
        for updates in (1, 10):
            moved = movement(kind, spike, updates)
            found[kind.__name__, spike, updates] = moved
            print(f"{kind.__name__}, largest gradient {spike:g}, updates {updates}: moved by {moved:.2f} learning rates")
for (kind, spike, updates), moved in found.items():
    if (kind, spike, updates) == ("AdamW8bit", 1.0, 10):
        assert moved < 2, found
    else:
        assert abs(moved - updates) < 0.05 * updates, found
PY
