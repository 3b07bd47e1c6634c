#!/usr/bin/env bash
# diffusers 0.42.1: DEISMultistepScheduler and SASolverScheduler set to flow matching
# (use_flow_sigmas with flow_prediction) do not end at sigma 0. The last level is written twice, so
# the last step goes nowhere, and its noise stays in the picture: sigma 0.50 of 1 after 4 steps with
# shift 3, 0.14 after 20, 0.058 after 50. No error and no warning. DPMSolverMultistep and UniPC end
# at 0, and reach the data exactly.
#
# Needs python3 with venv, a C compiler, readelf, 600 MB to download. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
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
import diffusers
import torch

# SDXL's own schedule; a model of flow matching for data that are all 0.5, exact at every sigma.
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def sample(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    for sigma, time in zip(scheduler.sigmas, scheduler.timesteps):
        velocity = (x - 0.5) / sigma
        x = scheduler.step(velocity, time, x).prev_sample
    return x


print("diffusers", diffusers.__version__, "torch", torch.__version__)
for name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver"):
    for steps in (4, 20, 50):
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config({**SDXL, **FLOW})
        picture = sample(scheduler, steps)
        mean, deviation, last = picture.mean().item(), picture.std().item(), scheduler.sigmas[-1].item()
        print(f"{name}, {steps} steps: last sigma {last:.4f}, picture 0.5 is {mean:.3f} +- {deviation:.3f}")
        if name in ("DEISMultistep", "SASolver"):
            assert last == scheduler.sigmas[-2].item() > 0.05, scheduler.sigmas
            assert abs(deviation - last) < 0.01, (deviation, last)
        else:
            assert last == 0 and deviation < 1e-4 and abs(mean - 0.5) < 1e-4, (last, mean, deviation)
PY
