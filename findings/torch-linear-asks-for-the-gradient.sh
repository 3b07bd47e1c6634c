#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU): torch.nn.functional.linear of an input that is a transposed view calls one
# `mm` over all rows if the weight requires a gradient, and a batched `bmm`, an item at a time, if
# the weight is frozen. Inside torch.no_grad() as well, where no gradient is recorded.
#
# So a model under training and its frozen copy run different products for the same numbers. With
# few rows per item MKL's two products differ in the last bits on an Intel Xeon (seen 2026-11-28:
# losses of 1.1980592384934425 and 1.1980592422187328 of one model), and agree on an AMD EPYC. A
# contiguous input goes through `addmm` either way. SDXL's transformer blocks enter with such a view
# (channels moved last).
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

TORCH_USE_RTLD_GLOBAL=1 "$folder/env/bin/python" - 2>/dev/null <<'PY'
import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm"}


def products(trained, contiguous):
    weight = torch.randn(32, 64, requires_grad=trained)
    x = torch.randn(2, 64, 6).transpose(1, 2)
    x = x.contiguous() if contiguous else x
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        torch.nn.functional.linear(x, weight, torch.randn(32))
    return sorted({event.key for event in seen.key_averages()} & PRODUCTS)


print("torch", torch.__version__)
found = {}
for trained in (True, False):
    for contiguous in (True, False):
        found[trained, contiguous] = products(trained, contiguous)
        kind = "trained" if trained else "frozen"
        print(f"{kind} weight, {'contiguous' if contiguous else 'transposed'}: {found[trained, contiguous]}")
assert found[True, False] == ["aten::mm"], found
assert found[False, False] == ["aten::bmm"], found
assert found[True, True] == found[False, True] == ["aten::addmm"], found
PY
