"""Writes the golden numbers of crates/rectiflow-sdxl/tests/golden/samplers.json by running ComfyUI's own samplers.

    pip install -r scripts/golden/requirements.txt
    pip install --no-deps k-diffusion==0.1.1.post1   # one file of it is used; its dependencies are many
    python scripts/golden/samplers.py COMFYUI_CHECKOUT

As schedules.py does, it takes only the few functions that are needed out of the checkout's files (by name, from the
syntax tree); nothing of their code ends up in the output. Each sampler goes through eight steps with a small closed
form in a UNet's place, which is not linear, so that nothing cancels: in float64, whose rounding does not hide a wrong
term. Four kinds of numbers:

- "samplers": the end of each sampler's way, for flow and for eps, with given step noise for the stochastic ones.
  Where k-diffusion on PyPI has the same sampler (everything for eps; Euler, Heun and DPM++ 2M for flow), the script
  checks that it agrees.
- "eps_form_on_flow": where k-diffusion's stochastic samplers, which know eps only, end on Gaussian data behind a flow
  model, as the deviation of what they draw; the data have 0.4.
- "rescale_cfg": what ComfyUI's RescaleCFG node makes of two predictions.
- "brownian": step noise of ComfyUI's BrownianTreeNoiseSampler, from torchsde.
"""

import argparse
import ast
import functools
import importlib.metadata
import json
import math
import pathlib
import subprocess
import sys
import types

import torch
import torchsde

SAMPLING = [
    "to_d",
    "get_ancestral_step",
    "default_noise_sampler",
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_euler_ancestral_RF",
    "sample_heun",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
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
# "sigma 1 to 0, as `simple` with shift 3 has it", and a stretch of SDXL's own levels.
SIGMAS = {
    "flow": [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0],
    "eps": [14.6146, 7.1, 4.2, 2.4, 1.4, 0.8, 0.4, 0.15, 0.0],
}
SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc"]
SHIFT = 3.0


def only(source, wanted, names):
    tree = ast.parse(source)
    found = [
        n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in wanted
    ]
    missing = set(wanted) - {n.name for n in found}
    if missing:
        sys.exit(f"no {sorted(missing)} in this version")
    exec(compile(ast.Module(found, []), "taken", "exec"), names)
    return types.SimpleNamespace(**names)


class CONST:
    """Marks a flow model, as ComfyUI's class of this name does, and has what its samplers ask of a flow model."""

    def percent_to_sigma(self, percent):
        return SHIFT * (1 - percent) / (1 + (SHIFT - 1) * (1 - percent))


class Model:
    """What a sampler sees of ComfyUI's wrapped models: a function, and a way to its `model_sampling`."""

    def __init__(self, denoise, flow):
        self.denoise = denoise
        sampling = CONST() if flow else object()
        patcher = types.SimpleNamespace(get_model_object=lambda _: sampling)
        inner = types.SimpleNamespace(model_sampling=sampling)
        self.inner_model = types.SimpleNamespace(inner_model=inner, model_patcher=patcher)

    def __call__(self, x, sigma, **_):
        return self.denoise(x, sigma[0])


def test_denoise(x, sigma):
    """Not the denoiser of any data; tests/samplers.rs has the same."""
    return 0.8 * torch.tanh(1.3 * x / (sigma**2 + 0.3)) + 0.1 * x / (1 + sigma)


def gaussian_denoise(x, sigma, mean=0.7, deviation=0.4):
    """The exact denoiser of Gaussian data under a flow model."""
    signal = 1 - sigma
    share = signal * deviation**2 / ((signal * deviation) ** 2 + sigma**2)
    return mean + share * (x - signal * mean)


def comfyui(checkout):
    fake = types.SimpleNamespace(model_sampling=types.SimpleNamespace(CONST=CONST))
    names = {
        "torch": torch,
        "math": math,
        "torchsde": torchsde,
        "partial": functools.partial,
        "comfy": fake,
    }
    names |= {
        "trange": lambda n, disable=None: range(n),
        "utils": types.SimpleNamespace(append_dims=append_dims),
    }
    sampling = only((checkout / "comfy/k_diffusion/sampling.py").read_text(), SAMPLING, names)
    names = {"torch": torch, "math": math, "trange": lambda n, disable=None: range(n)}
    unipc = only((checkout / "comfy/extra_samplers/uni_pc.py").read_text(), UNIPC, names)
    return sampling, unipc


def k_diffusion():
    """Its file alone: importing the package needs a dozen others."""
    file = next(
        f
        for f in importlib.metadata.files("k-diffusion")
        if str(f).endswith("k_diffusion/sampling.py")
    )
    wanted = [
        name
        for name in SAMPLING
        if "half_log" not in name and "offset" not in name and "RF" not in name
    ]
    names = {
        "torch": torch,
        "math": math,
        "torchsde": torchsde,
        "trange": lambda n, disable=None: range(n),
    }
    return only(
        file.locate().read_text(),
        wanted,
        names | {"utils": types.SimpleNamespace(append_dims=append_dims)},
    )


def append_dims(x, dims):
    return x[(...,) + (None,) * (dims - x.ndim)]


def run(source, unipc, name, parameterization, x, noises, denoise=test_denoise):
    model = Model(denoise, parameterization == "flow")
    sigmas = torch.tensor(SIGMAS[parameterization], dtype=torch.float64)
    if name == "uni_pc":
        torch.set_default_dtype(torch.float64)  # it makes tensors of its coefficients
        out = unipc.sample_unipc(model, x.clone(), sigmas, extra_args={}, disable=True)
        torch.set_default_dtype(torch.float32)
        # KSampler divides by the signal that is left at the last level.
        return out / (1 - 0.001) if parameterization == "flow" else out
    queue = iter(noises)
    extra = (
        {"noise_sampler": lambda *_: next(queue)}
        if name in ("euler_ancestral", "dpmpp_2m_sde")
        else {}
    )
    return getattr(source, f"sample_{name}")(model, x.clone(), sigmas, **extra)


def sampler_cases(comfy, unipc, original):
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    for parameterization in ("flow", "eps"):
        start = SIGMAS[parameterization][0]
        for name in SAMPLERS:
            noise, noises = normal(2, 1, 2, 2), [normal(2, 1, 2, 2) for _ in range(8)]
            x = noise * (start if parameterization == "flow" else math.sqrt(1 + start**2))
            out = run(comfy, unipc, name, parameterization, x, noises)
            known = parameterization == "eps" or name in ("euler", "heun", "dpmpp_2m")
            if name != "uni_pc" and known:
                difference = (
                    (run(original, None, name, parameterization, x, noises) - out).abs().max()
                )
                assert difference < 1e-9, (
                    f"k-diffusion's {name} differs for {parameterization} by {difference}"
                )
            yield {
                "sampler": name,
                "parameterization": parameterization,
                "sigmas": SIGMAS[parameterization],
                "x": flat(x),
                "noises": [flat(n) for n in noises],
                "end": flat(out),
            }


def eps_form_on_flow(source, name, steps=64):
    """What k-diffusion's sampler draws behind a flow model: the deviation, from the response to each noise alone."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    # One row for the start and one for each step: every number of a row is linear in its one noise.
    rows = torch.eye(steps + 1, dtype=torch.float64)[:, :, None, None]
    queue = iter(range(1, steps + 1))
    model = Model(lambda x, sigma: gaussian_denoise(x, sigma, mean=0.0), True)
    draw = lambda *_: rows[:, next(queue)][:, None]
    end = getattr(source, f"sample_{name}")(model, rows[:, :1], sigmas, noise_sampler=draw)
    return float(end.square().sum().sqrt())


def rescale_cases(checkout):
    """The node patches a model with a function of ComfyUI's arguments; here the model only keeps it."""
    taken = only(
        (checkout / "comfy_extras/nodes_model_advanced.py").read_text(),
        ["RescaleCFG"],
        {"torch": torch},
    )
    generator = torch.Generator().manual_seed(3)
    normal = lambda: torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    for sigma, scale, multiplier in [(0.8, 4.5, 0.7), (7.1, 7.0, 1.0)]:
        x, cond, uncond = normal() * (1 + sigma), normal(), normal()
        kept = []
        model = types.SimpleNamespace(set_model_sampler_cfg_function=kept.append)
        taken.RescaleCFG().patch(types.SimpleNamespace(clone=lambda: model), multiplier)
        sigmas = torch.full((2,), sigma, dtype=torch.float64)
        args = {
            "cond": x - cond,
            "uncond": x - uncond,
            "cond_scale": scale,
            "sigma": sigmas,
            "input": x,
        }
        yield {
            "sigma": sigma,
            "cfg": scale,
            "share": multiplier,
            "x": flat(x),
            "cond": flat(cond),
            "uncond": flat(uncond),
            "denoised": flat(x - kept[0](args)),
        }


def brownian_cases(comfy):
    for seed, shape, sigmas in [
        (5, (1, 4, 3, 2), [1.0, 0.9545, 0.75, 0.3]),
        (2**63 + 12345, (2, 4, 2, 2), [14.614643, 7.1, 1.4, 0.0291675]),
        (0, (1, 4, 2, 3), [0.99997, 0.123457]),
    ]:
        sigmas = torch.tensor(sigmas)
        sampler = comfy.BrownianTreeNoiseSampler(
            torch.zeros(shape), sigmas[-1], sigmas[0], seed=seed, cpu=True
        )
        noises = [flat(sampler(a, b)) for a, b in zip(sigmas[:-1], sigmas[1:])]
        yield {"seed": str(seed), "shape": shape, "sigmas": flat(sigmas), "noises": noises}


def flat(tensor):
    return [float(v) for v in tensor.flatten()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--commit", help="if the checkout is not a git work tree")
    parser.add_argument(
        "--out", type=pathlib.Path, default="crates/rectiflow-sdxl/tests/golden/samplers.json"
    )
    args = parser.parse_args()
    git = ["git", "-C", str(args.checkout), "rev-parse", "HEAD"]
    commit = (
        args.commit
        or subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    )
    (comfy, unipc), original = comfyui(args.checkout), k_diffusion()
    golden = {
        "comfyui_commit": commit,
        "torch": torch.__version__,
        "torchsde": importlib.metadata.version("torchsde"),
        "k_diffusion": importlib.metadata.version("k-diffusion"),
        "samplers": list(sampler_cases(comfy, unipc, original)),
        "eps_form_on_flow": {
            name: eps_form_on_flow(original, name) for name in ("euler_ancestral", "dpmpp_2m_sde")
        },
        "rescale_cfg": list(rescale_cases(args.checkout)),
        "brownian": list(brownian_cases(comfy)),
    }
    args.out.write_text(json.dumps(golden) + "\n")
    print({name: round(value, 4) for name, value in golden["eps_form_on_flow"].items()})
    print(args.out, args.out.stat().st_size, "bytes")


main()
