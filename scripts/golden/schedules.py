"""Writes crates/rectiflow-sdxl/tests/golden/schedules.json.gz: sigmas by ComfyUI's own functions.

    python scripts/golden/schedules.py COMFYUI_CHECKOUT

comfyui_source.py takes the functions and classes that make sigmas out of the checkout; they need
torch, numpy and scipy. The output has the numbers and the commit they came from. --sweep prints the
numbers for every step count instead (for
`cargo test -p rectiflow-sdxl --test schedules -- --ignored`).
"""

import functools
import gzip
import json
import math
import types

import numpy
import scipy
import scipy.stats
import torch
from comfyui_source import argument_parser, commit_of, take

TARGET = "crates/rectiflow-sdxl/tests/golden/schedules.json.gz"
WANTED = {
    "comfy/ldm/modules/diffusionmodules/util.py": ["make_beta_schedule"],
    "comfy/model_sampling.py": [
        "ModelSamplingDiscrete",
        "ModelSamplingDiscreteFlow",
        "time_snr_shift",
    ],
    "comfy/k_diffusion/sampling.py": ["append_zero", "get_sigmas_karras", "get_sigmas_exponential"],
    "comfy/samplers.py": [
        "simple_scheduler",
        "ddim_scheduler",
        "normal_scheduler",
        "beta_scheduler",
        "kl_optimal_scheduler",
    ],
}
SCHEDULES = [
    *("simple", "normal", "sgm_uniform", "beta"),
    *("karras", "exponential", "ddim_uniform", "kl_optimal"),
]
STEPS = [1, 2, 3, 7, 8, 20, 28, 50, 99, 1000]
SHIFTS = [0.5, 1.0, 3.0, 6.0, 20.0]
SWEEP_SHIFTS = [0.5, 0.7, 1.0, 1.7, 3.0, 4.3, 6.0, 11.1, 20.0]
# Further shifts, drawn between 0.5 and 20, each with one drawn number of steps per schedule.
NUM_RANDOM = 8


def load(checkout):
    names = {"torch": torch, "math": math, "numpy": numpy, "np": numpy, "scipy": scipy}
    for file, wanted in WANTED.items():
        take(checkout / file, wanted, names)
    return types.SimpleNamespace(**names)


def sigmas(comfy, name, model, steps):
    by_model = {
        "simple": comfy.simple_scheduler,
        "normal": comfy.normal_scheduler,
        "sgm_uniform": functools.partial(comfy.normal_scheduler, sgm=True),
        "beta": comfy.beta_scheduler,
        "ddim_uniform": comfy.ddim_scheduler,
    }
    by_ends = {
        "karras": comfy.get_sigmas_karras,
        "exponential": comfy.get_sigmas_exponential,
        "kl_optimal": comfy.kl_optimal_scheduler,
    }
    if name in by_model:
        return by_model[name](model, steps)
    lowest, highest = float(model.sigma_min), float(model.sigma_max)
    return by_ends[name](n=steps, sigma_min=lowest, sigma_max=highest)


def models(comfy, shifts):
    for shift in shifts:
        model = comfy.ModelSamplingDiscreteFlow()
        model.set_parameters(shift=shift, multiplier=1000)
        yield {"parameterization": "flow", "shift": shift}, model
    yield {"parameterization": "eps", "shift": 1.0}, comfy.ModelSamplingDiscrete()


def cases(comfy, shifts, step_counts):
    """Yields the sigmas of each model and schedule for each of the numbers of `step_counts()`."""
    for head, model in models(comfy, shifts):
        for name in SCHEDULES:
            for steps in step_counts():
                # With one step kl_optimal divides 0 by 0.
                if name == "kl_optimal" and steps == 1:
                    continue
                values = [shortest(float(s)) for s in sigmas(comfy, name, model, steps)]
                yield {**head, "schedule": name, "steps": steps, "sigmas": values}


def shortest(value):
    """The shortest decimal that is the same fp32 number."""
    return float(str(numpy.float32(value)))


def main():
    parser = argument_parser(__doc__, TARGET)
    parser.add_argument(
        "--sweep", action="store_true", help="print the sigmas for every step count instead"
    )
    args = parser.parse_args()
    comfy = load(args.checkout)
    if args.sweep:
        for case in cases(comfy, SWEEP_SHIFTS, lambda: range(1, 1001)):
            print(json.dumps(case))
        return
    random = numpy.random.default_rng(1)
    drawn = numpy.exp(random.uniform(math.log(0.5), math.log(20), NUM_RANDOM))
    shifts = [round(float(shift), 4) for shift in drawn]
    found = list(cases(comfy, SHIFTS, lambda: STEPS))
    found += list(cases(comfy, shifts, lambda: [int(random.integers(2, 1000))]))
    lines = ",\n".join(json.dumps(case) for case in found)
    head = {
        "comfyui_commit": commit_of(args),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
    }
    text = json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n"
    args.out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(found)} cases, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
