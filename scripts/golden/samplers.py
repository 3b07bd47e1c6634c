"""Writes crates/rectiflow-sdxl/tests/golden/samplers.json: what ComfyUI's own samplers compute.

    pip install -r scripts/golden/requirements.txt
    pip install --no-deps k-diffusion==0.1.1.post1   # only one file of it is used
    python scripts/golden/samplers.py COMFYUI_CHECKOUT

comfyui_source.py takes the samplers' functions out of the checkout. Each sampler takes eight steps
with a small closed form instead of a UNet. It is not linear, so that errors do not cancel, and runs
in float64, whose rounding does not hide a wrong term. Four kinds of numbers:

- "samplers": the result of each sampler, for flow and for eps, with fixed step noise for the
  stochastic ones. Where k-diffusion on PyPI has the same sampler (all of them for eps; Euler, Heun
  and DPM++ 2M for flow), the script checks that it agrees.
- "eps_form_on_flow": the deviation of what k-diffusion's stochastic samplers, which know eps only,
  draw from a flow model of Gaussian data. The deviation of the data is 0.4.
- "rescale_cfg": the result of ComfyUI's RescaleCFG node on two predictions.
- "brownian": step noise of ComfyUI's BrownianTreeNoiseSampler, from torchsde.
"""

import functools
import importlib.metadata
import itertools
import json
import math
import types

import torch
import torchsde
from comfyui_source import argument_parser, commit_of, take

TARGET = "crates/rectiflow-sdxl/tests/golden/samplers.json"
# What k-diffusion has, and what ComfyUI has besides.
K_DIFFUSION = [
    "to_d",
    "get_ancestral_step",
    "default_noise_sampler",
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
]
COMFYUI = [
    *K_DIFFUSION,
    "sample_euler_ancestral_RF",
    "sigma_to_half_log_snr",
    "offset_first_sigma_for_snr",
]
UNIPC = [
    "UniPC",
    "SigmaConvert",
    "model_wrapper",
    "predict_eps_sigma",
    "sample_unipc",
    "expand_dims",
]
# The sigmas of `simple` with shift 3, from 1 to 0, and some of SDXL's own levels.
SIGMAS = {
    "flow": [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0],
    "eps": [14.6146, 7.1, 4.2, 2.4, 1.4, 0.8, 0.4, 0.15, 0.0],
}
SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc"]
STOCHASTIC = ["euler_ancestral", "dpmpp_2m_sde"]
SHIFT = 3.0
# Seed, shape, sigmas.
BROWNIAN = [
    (5, (1, 4, 3, 2), [1.0, 0.9545, 0.75, 0.3]),
    (2**63 + 12345, (2, 4, 2, 2), [14.614643, 7.1, 1.4, 0.0291675]),
    (0, (1, 4, 2, 3), [0.99997, 0.123457]),
]


class CONST:
    """Marks a flow model, as ComfyUI's class of this name, and has what its samplers ask for."""

    def percent_to_sigma(self, percent):
        return SHIFT * (1 - percent) / (1 + (SHIFT - 1) * (1 - percent))


class Model:
    """The part of ComfyUI's wrapped models that samplers use: a call and its `model_sampling`."""

    def __init__(self, denoise, flow):
        self.denoise = denoise
        sampling = CONST() if flow else object()
        patcher = types.SimpleNamespace(get_model_object=lambda _: sampling)
        inner = types.SimpleNamespace(model_sampling=sampling)
        self.inner_model = types.SimpleNamespace(inner_model=inner, model_patcher=patcher)

    def __call__(self, x, sigma, **_):
        return self.denoise(x, sigma[0])


def test_denoise(x, sigma):
    """Not the denoiser of any data; tests/samplers.rs has the same function."""
    return 0.8 * torch.tanh(1.3 * x / (sigma**2 + 0.3)) + 0.1 * x / (1 + sigma)


def gaussian_denoise(x, sigma, mean=0.7, deviation=0.4):
    """The exact denoiser of Gaussian data under a flow model."""
    signal = 1 - sigma
    share = signal * deviation**2 / ((signal * deviation) ** 2 + sigma**2)
    return mean + share * (x - signal * mean)


def trange(n, disable=None):
    """tqdm's function of this name, without the progress bar."""
    return range(n)


def append_dims(x, dims):
    return x[(...,) + (None,) * (dims - x.ndim)]


def flat(tensor):
    return [float(value) for value in tensor.flatten()]


def sampling_names():
    """The names that the samplers of both projects refer to."""
    utils = types.SimpleNamespace(append_dims=append_dims)
    return {"torch": torch, "math": math, "torchsde": torchsde, "trange": trange, "utils": utils}


def comfyui(checkout):
    """ComfyUI's samplers; UniPC is in a file of its own."""
    comfy = types.SimpleNamespace(model_sampling=types.SimpleNamespace(CONST=CONST))
    names = sampling_names() | {"partial": functools.partial, "comfy": comfy}
    sampling = take(checkout / "comfy/k_diffusion/sampling.py", COMFYUI, names)
    names = {"torch": torch, "math": math, "trange": trange}
    unipc = take(checkout / "comfy/extra_samplers/uni_pc.py", UNIPC, names)
    return sampling, unipc


def k_diffusion():
    """k-diffusion's samplers from their file: importing the package requires a dozen others."""
    files = importlib.metadata.files("k-diffusion")
    file = next(f for f in files if str(f).endswith("k_diffusion/sampling.py"))
    return take(file.locate(), K_DIFFUSION, sampling_names())


def run_unipc(unipc, parameterization, x):
    model = Model(test_denoise, parameterization == "flow")
    sigmas = torch.tensor(SIGMAS[parameterization], dtype=torch.float64)
    # UniPC makes tensors of its coefficients in the default type.
    torch.set_default_dtype(torch.float64)
    out = unipc.sample_unipc(model, x.clone(), sigmas, extra_args={}, disable=True)
    torch.set_default_dtype(torch.float32)
    # KSampler divides by the signal remaining at the last level.
    return out / (1 - 0.001) if parameterization == "flow" else out


def run(source, name, parameterization, x, noises):
    model = Model(test_denoise, parameterization == "flow")
    sigmas = torch.tensor(SIGMAS[parameterization], dtype=torch.float64)
    queue = iter(noises)
    extra = {"noise_sampler": lambda *_: next(queue)} if name in STOCHASTIC else {}
    return getattr(source, f"sample_{name}")(model, x.clone(), sigmas, **extra)


def check_against_original(original, case, x, noises, out):
    """Checks that k-diffusion agrees, where it has the sampler for this parameterization."""
    name, parameterization = case
    flow_too = name in ("euler", "heun", "dpmpp_2m")
    if name == "uni_pc" or (parameterization == "flow" and not flow_too):
        return
    difference = (run(original, name, parameterization, x, noises) - out).abs().max()
    where = f"k-diffusion's {name} for {parameterization}"
    assert difference < 1e-9, f"{where} differs by {difference}"


def sampler_cases(comfy, unipc, original):
    generator = torch.Generator().manual_seed(1)
    for parameterization in ("flow", "eps"):
        start = SIGMAS[parameterization][0]
        for name in SAMPLERS:
            # The start and eight steps' noise.
            noise, *noises = (
                torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(9)
            )
            x = noise * (start if parameterization == "flow" else math.sqrt(1 + start**2))
            if name == "uni_pc":
                out = run_unipc(unipc, parameterization, x)
            else:
                out = run(comfy, name, parameterization, x, noises)
            check_against_original(original, (name, parameterization), x, noises, out)
            yield {
                "sampler": name,
                "parameterization": parameterization,
                "sigmas": SIGMAS[parameterization],
                "x": flat(x),
                "noises": [flat(n) for n in noises],
                "end": flat(out),
            }


def eps_form_on_flow(source, name, steps=64):
    """The deviation of what k-diffusion's sampler draws from a flow model of Gaussian data.

    It follows from the response to each noise alone.
    """
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    # One row for the start and one for each step: a row is linear in its own noise.
    rows = torch.eye(steps + 1, dtype=torch.float64)[:, :, None, None]
    queue = iter(range(1, steps + 1))
    model = Model(functools.partial(gaussian_denoise, mean=0.0), True)
    sample = getattr(source, f"sample_{name}")
    end = sample(model, rows[:, :1], sigmas, noise_sampler=lambda *_: rows[:, next(queue)][:, None])
    return float(end.square().sum().sqrt())


class Cloneable:
    """A model whose clone is the given one."""

    def __init__(self, copy):
        self.copy = copy

    def clone(self):
        return self.copy


def rescale_cases(checkout):
    """RescaleCFG patches a model with a function; a stand-in for the model keeps that function."""
    file = checkout / "comfy_extras/nodes_model_advanced.py"
    taken = take(file, ["RescaleCFG"], {"torch": torch})
    generator = torch.Generator().manual_seed(3)
    for sigma, scale, multiplier in [(0.8, 4.5, 0.7), (7.1, 7.0, 1.0)]:
        x, cond, uncond = (
            torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        x = x * (1 + sigma)
        kept = []
        patched = types.SimpleNamespace(set_model_sampler_cfg_function=kept.append)
        taken.RescaleCFG().patch(Cloneable(patched), multiplier)
        rescale = kept[0]
        args = {
            "cond": x - cond,
            "uncond": x - uncond,
            "cond_scale": scale,
            "sigma": torch.full((2,), sigma, dtype=torch.float64),
            "input": x,
        }
        yield {
            "sigma": sigma,
            "cfg": scale,
            "share": multiplier,
            "x": flat(x),
            "cond": flat(cond),
            "uncond": flat(uncond),
            "denoised": flat(x - rescale(args)),
        }


def brownian_cases(comfy):
    for seed, shape, levels in BROWNIAN:
        sigmas = torch.tensor(levels)
        lowest, highest = sigmas[-1], sigmas[0]
        sampler = comfy.BrownianTreeNoiseSampler(
            torch.zeros(shape), lowest, highest, seed=seed, cpu=True
        )
        noises = [flat(sampler(a, b)) for a, b in itertools.pairwise(sigmas)]
        yield {"seed": str(seed), "shape": shape, "sigmas": flat(sigmas), "noises": noises}


def main():
    args = argument_parser(__doc__, TARGET).parse_args()
    (comfy, unipc), original = comfyui(args.checkout), k_diffusion()
    golden = {
        "comfyui_commit": commit_of(args),
        "torch": torch.__version__,
        "torchsde": importlib.metadata.version("torchsde"),
        "k_diffusion": importlib.metadata.version("k-diffusion"),
        "samplers": list(sampler_cases(comfy, unipc, original)),
        "eps_form_on_flow": {name: eps_form_on_flow(original, name) for name in STOCHASTIC},
        "rescale_cfg": list(rescale_cases(args.checkout)),
        "brownian": list(brownian_cases(comfy)),
    }
    args.out.write_text(json.dumps(golden) + "\n")
    print({name: round(value, 4) for name, value in golden["eps_form_on_flow"].items()})
    print(args.out, args.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
