#!/usr/bin/env bash
# diffusers 0.42.1: save_pretrained() of DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
# DPMSolverMultistepInverseScheduler and SASolverScheduler, as they are by default, writes
# `"lambda_min_clipped": -Infinity` into scheduler_config.json. That is not JSON: strict readers
# (orjson here; JSON.parse of browsers and Node.js, serde_json) refuse the whole file, and with it a
# model folder that any pipeline with such a scheduler has saved.
#
# Needs python3 with venv, a C compiler, readelf, 600 MB to download. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    orjson==3.13.0 \
    diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 scipy==1.17.1 safetensors==0.8.0 pillow==13.0.0 \
    huggingface_hub==2.4.0 regex==2026.11.15 requests==2.34.2 importlib_metadata==10.2.0 zipp==4.1.2 \
    httpx2==2.16.2 httpcore2==2.16.2 anyio==4.16.0 h11==0.16.0 idna==3.20 certifi==2026.10.18 \
    truststore==0.10.5 urllib3==2.8.0 charset-normalizer==3.5.2 PyYAML==6.0.3 tqdm==4.70.1 packaging==26.3 \
    filelock==4.2.12 fsspec==2026.9.0 typing_extensions==4.16.0 sympy==1.14.0 mpmath==1.4.1 networkx==3.6.1 \
    Jinja2==3.1.6 MarkupSafe==3.0.4 setuptools==80.9.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85

# The wheel of torch is built for CUDA. Empty shared objects stand in for the 4 GB of CUDA libraries,
# which nothing here calls; symbols are then resolved when they are called (TORCH_USE_RTLD_GLOBAL).
lib=$(echo "$folder"/env/lib/python*/site-packages/torch/lib)
for needed in $(readelf -d "$lib"/lib*.so* 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(lib\(cu\|nv\|nccl\).*\)\]/\1/p' | sort -u); do
    if ! find "$lib/../.." -name "$needed" | grep -q .; then
        cc -shared "-Wl,-soname,$needed" -x c /dev/null -o "$lib/$needed"
    fi
done

TORCH_USE_RTLD_GLOBAL=1 "$folder/env/bin/python" - <<'PY'
import importlib.metadata
import json
import pathlib
import tempfile

import diffusers
import orjson

print("diffusers", diffusers.__version__, "orjson", importlib.metadata.version("orjson"))
refused = set()
for name in sorted(name for name in dir(diffusers) if name.startswith(("DPMSolverM", "DPMSolverS", "SAS", "Euler", "UniPC"))):
    with tempfile.TemporaryDirectory() as folder:
        try:
            getattr(diffusers, name)().save_pretrained(folder)
        except ImportError:
            # DPMSolverSDEScheduler needs torchsde.
            continue
        data = (pathlib.Path(folder) / "scheduler_config.json").read_bytes()
    json.loads(data)
    try:
        orjson.loads(data)
        print(f"{name}: JSON")
    except orjson.JSONDecodeError as error:
        line = next(line for line in data.decode().splitlines() if "Infinity" in line)
        print(f"{name}: {error}; {line.strip()}")
        refused.add(name)
kinds = ("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "SASolver")
assert refused == {f"{kind}Scheduler" for kind in kinds}, refused
PY
