"""Writes the golden sigmas of crates/rectiflow-sdxl/tests/golden/schedules.json.gz by running ComfyUI's own functions.

    python scripts/golden/schedules.py COMFYUI_CHECKOUT

Only the few functions and classes that make sigmas are taken out of the checkout's files (by name, from the syntax
tree), so that none of ComfyUI's many dependencies is needed; torch, numpy and scipy are. Nothing of its code ends up in
the output: numbers, and the commit they came from. Add --sweep to print the numbers of every step count instead (for
`cargo test -p rectiflow-sdxl --test schedules -- --ignored`).
"""

import argparse
import ast
import functools
import gzip
import json
import math
import pathlib
import subprocess
import sys
import types

import numpy
import scipy
import scipy.stats
import torch

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
STEPS = [1, 2, 3, 7, 8, 20, 28, 50, 99, 1000]
SHIFTS = [0.5, 1.0, 3.0, 6.0, 20.0]
# As many shifts as this between 0.5 and 20 that nobody chose, each with a number of steps for each schedule.
NUM_RANDOM = 8


def load(checkout):
    names = {"torch": torch, "math": math, "numpy": numpy, "np": numpy, "scipy": scipy}
    for file, wanted in WANTED.items():
        tree = ast.parse((checkout / file).read_text())
        found = [
            n
            for n in tree.body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in wanted
        ]
        missing = set(wanted) - {n.name for n in found}
        if missing:
            sys.exit(f"{file} of this ComfyUI has no {sorted(missing)}")
        exec(compile(ast.Module(found, []), file, "exec"), names)
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
    return by_ends[name](
        n=steps, sigma_min=float(model.sigma_min), sigma_max=float(model.sigma_max)
    )


NAMES = [
    "simple",
    "normal",
    "sgm_uniform",
    "beta",
    "karras",
    "exponential",
    "ddim_uniform",
    "kl_optimal",
]


def models(comfy, shifts):
    for shift in shifts:
        model = comfy.ModelSamplingDiscreteFlow()
        model.set_parameters(shift=shift, multiplier=1000)
        yield {"parameterization": "flow", "shift": shift}, model
    yield {"parameterization": "eps", "shift": 1.0}, comfy.ModelSamplingDiscrete()


def cases(comfy, shifts, steps_of):
    for head, model in models(comfy, shifts):
        for name in NAMES:
            for steps in steps_of(head, name):
                if name == "kl_optimal" and steps == 1:
                    continue  # 0 / 0 there
                values = [float(s) for s in sigmas(comfy, name, model, steps)]
                yield {
                    **head,
                    "schedule": name,
                    "steps": steps,
                    "sigmas": [shortest(v) for v in values],
                }


def shortest(value):
    """The shortest decimal that is the same fp32 number."""
    return float(str(numpy.float32(value)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--commit", help="if the checkout is not a git work tree")
    parser.add_argument("--sweep", action="store_true", help="every step count; to standard output")
    parser.add_argument(
        "--out", type=pathlib.Path, default="crates/rectiflow-sdxl/tests/golden/schedules.json.gz"
    )
    args = parser.parse_args()
    comfy = load(args.checkout)
    if args.sweep:
        for case in cases(
            comfy, [0.5, 0.7, 1.0, 1.7, 3.0, 4.3, 6.0, 11.1, 20.0], lambda *_: range(1, 1001)
        ):
            print(json.dumps(case))
        return
    git = ["git", "-C", str(args.checkout), "rev-parse", "HEAD"]
    commit = (
        args.commit
        or subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    )
    random = numpy.random.default_rng(1)
    shifts = [
        round(float(shift), 4)
        for shift in numpy.exp(random.uniform(math.log(0.5), math.log(20), NUM_RANDOM))
    ]
    found = list(cases(comfy, SHIFTS, lambda head, name: STEPS))
    found += list(cases(comfy, shifts, lambda head, name: [int(random.integers(2, 1000))]))
    lines = ",\n".join(json.dumps(case) for case in found)
    head = {"comfyui_commit": commit, "torch": torch.__version__, "scipy": scipy.__version__}
    text = json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n"
    args.out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(found)} cases, {args.out.stat().st_size} bytes")


main()
