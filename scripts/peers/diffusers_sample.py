"""Draws the same pictures with `rectiflow sample` and with diffusers' stock StableDiffusionXLPipeline, and compares.

    python scripts/peers/diffusers_sample.py EXPORT --rectiflow target/release/rectiflow [--shift 6] [--steps 12] ...

EXPORT is a folder that `rectiflow export --format diffusers` wrote. Nothing is fetched. Both programs start from the
same noise (torch's CPU generator) and run in fp32. Two comparisons:

- "same sigmas": the pipeline steps through the very sigmas of `rectiflow schedule` with a ten-line Euler. Everything
  but the scheduler is stock: tokenizers, text encoders, size conditioning, guidance, UNet, VAE, rounding. The pictures
  must agree to --tolerance levels of 255, at the worst pixel.
- "stock": the pipeline as it loads, with the scheduler that the export configured. For flow models that is
  DPMSolverMultistepScheduler of order 1, which is Euler but starts at sigma 0.9998 instead of 1 and truncates
  timesteps to integers; the mean difference must stay below --stock-tolerance levels. For eps and v models the stock
  scheduler visits other noise levels, so the number is printed only.

A third number shows that the test can fail: how far the picture of another prompt is away.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

PROMPT = "a red apple on a white background"
OTHER_PROMPT = "two blue birds, night sky, black background"


class GivenSigmas:
    """Euler's method on given sigmas, with what the SDXL pipeline asks of a scheduler."""

    order = 1

    def __init__(self, sigmas, prediction):
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        self.prediction = prediction
        flow = prediction == "flow"
        self.init_noise_sigma = self.sigmas[0] if flow else (1 + self.sigmas[0] ** 2) ** 0.5
        self.timesteps = self.sigmas[:-1] * 1000 if flow else nearest_steps(self.sigmas[:-1])
        self.config = {}
        self.step_index = 0

    def set_timesteps(self, *_, **__):
        self.step_index = 0

    def scale_model_input(self, sample, _):
        if self.prediction == "flow":
            return sample
        return sample / (1 + self.sigmas[self.step_index] ** 2) ** 0.5

    def step(self, output, _, sample, return_dict=False):
        sigma, following = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self.step_index += 1
        if self.prediction == "v_prediction":
            variance = 1 + sigma**2
            slope = (sample - (sample / variance - output * sigma / variance**0.5)) / sigma
        else:
            slope = output
        return (sample + slope * (following - sigma),)


def nearest_steps(sigmas):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bars = torch.cumprod(1 - betas, 0)
    table = ((1 - alpha_bars) / alpha_bars).sqrt().log()
    return (sigmas.double().log()[:, None] - table[None]).abs().argmin(1).float()


def rectiflow_pictures(args, prompt, folder):
    command = [
        args.rectiflow,
        "sample",
        "--model",
        args.export,
        "--prompt",
        prompt,
        "--negative",
        args.negative,
    ]
    settings = {
        "steps": args.steps,
        "schedule": args.schedule,
        "shift": args.shift,
        "cfg": args.cfg,
        "seed": args.seed,
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    command += [
        "--size",
        f"{args.width}x{args.height}",
        "--batch",
        str(args.batch),
        "--out",
        folder,
    ]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    files = sorted(path for path in pathlib.Path(folder).glob("*.png") if path.name != "grid.png")
    return numpy.stack([numpy.asarray(Image.open(path).convert("RGB")) for path in files]).astype(
        int
    )


def rectiflow_sigmas(args, prediction):
    parameterization = {"flow": "flow", "epsilon": "eps", "v_prediction": "v"}[prediction]
    command = [
        args.rectiflow,
        "schedule",
        args.schedule,
        "--steps",
        args.steps,
        "--shift",
        args.shift,
    ]
    command += ["--parameterization", parameterization, "--json"]
    out = subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(out.strip().splitlines()[-1])["sigmas"]


def pipeline_pictures(pipe, args, prompt):
    latent = (args.batch, 4, args.height // 8, args.width // 8)
    noise = torch.randn(latent, generator=torch.manual_seed(args.seed))
    images = pipe(
        prompt=[prompt] * args.batch,
        negative_prompt=[args.negative] * args.batch,
        num_inference_steps=args.steps,
        guidance_scale=args.cfg,
        height=args.height,
        width=args.width,
        latents=noise,
        output_type="pil",
    ).images
    return numpy.stack([numpy.asarray(image.convert("RGB")) for image in images]).astype(int)


def report(name, ours, theirs):
    difference = numpy.abs(ours - theirs)
    print(f"{name}: max {difference.max()}, mean {difference.mean():.4f} levels of 255")
    return difference


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=pathlib.Path)
    parser.add_argument("--rectiflow", type=pathlib.Path, default="target/release/rectiflow")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--schedule", default="simple")
    parser.add_argument(
        "--shift", type=float, default=6.0, help="the one that the export was given"
    )
    parser.add_argument("--cfg", type=float, default=4.5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--negative", default="")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tolerance", type=int, default=1, help="worst pixel, same sigmas")
    parser.add_argument(
        "--stock-tolerance", type=float, default=2.0, help="mean, stock scheduler, flow only"
    )
    args = parser.parse_args()

    pipe = StableDiffusionXLPipeline.from_pretrained(
        args.export, local_files_only=True, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    stock = pipe.scheduler
    prediction = stock.config.prediction_type.replace("flow_prediction", "flow")
    with tempfile.TemporaryDirectory() as folder:
        ours = rectiflow_pictures(args, PROMPT, pathlib.Path(folder) / "one")
        other = rectiflow_pictures(args, OTHER_PROMPT, pathlib.Path(folder) / "other")
    pipe.scheduler = GivenSigmas(rectiflow_sigmas(args, prediction), prediction)
    print(
        f"{args.export.name}: {prediction}, {args.schedule}, {args.steps} steps, {args.width}x{args.height}, {args.batch} pictures"
    )
    same = report("same sigmas", ours, pipeline_pictures(pipe, args, PROMPT))
    pipe.scheduler = stock
    loose = report(f"stock {type(stock).__name__}", ours, pipeline_pictures(pipe, args, PROMPT))
    apart = report("another prompt", ours, other)
    failures = []
    if same.max() > args.tolerance:
        failures.append(f"same sigmas differ by {same.max()}, more than {args.tolerance}")
    if prediction == "flow" and loose.mean() > args.stock_tolerance:
        failures.append(
            f"the stock scheduler's mean difference is {loose.mean():.4f}, more than {args.stock_tolerance}"
        )
    if apart.mean() < 10 * max(same.mean(), 0.01):
        failures.append("another prompt hardly changes the picture: this comparison shows nothing")
    sys.exit("; ".join(failures) or 0)


main()
