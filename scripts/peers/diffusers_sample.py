"""Compares pictures of `rectiflow sample` with those of diffusers' stock StableDiffusionXLPipeline.

    python scripts/peers/diffusers_sample.py EXPORT --rectiflow target/release/rectiflow [--shift 6]
        [--steps 12] ...

EXPORT is a folder that `rectiflow export --format diffusers` wrote. Nothing is downloaded. Both
programs start from the same noise (torch's CPU generator) and run in fp32. Two comparisons:

- "same sigmas": the pipeline steps through the sigmas of `rectiflow schedule` with a ten-line
  Euler. Everything but the scheduler is stock: tokenizers, text encoders, size conditioning,
  guidance, UNet, VAE, rounding. The worst pixels must agree to --tolerance levels of 255.
- "stock": the pipeline as loaded, with the scheduler that the export configured. For flow models
  that is DPMSolverMultistepScheduler of order 1, which is Euler but starts at sigma 0.9998 instead
  of 1 and truncates timesteps to integers; the mean difference must stay below --stock-tolerance
  levels. For eps and v models the stock scheduler visits other noise levels, so the number is only
  printed.

A third number, the distance to the picture of another prompt, shows that the comparison can fail.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch
from PIL import Image

PROMPT = "a red apple on a white background"
OTHER_PROMPT = "two blue birds, night sky, black background"


class GivenSigmas:
    """Euler's method on given sigmas, with the scheduler interface that the SDXL pipeline uses."""

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
    """The training timesteps whose noise levels are nearest, on SDXL's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bars = torch.cumprod(1 - betas, 0)
    table = ((1 - alpha_bars) / alpha_bars).sqrt().log()
    return (sigmas.double().log()[:, None] - table[None]).abs().argmin(1).float()


def stacked(images):
    """Pictures as one array of integers, [n, h, w, 3]."""
    return numpy.stack([numpy.asarray(image.convert("RGB")) for image in images]).astype(int)


def rectiflow_pictures(args, prompt, folder):
    command = [args.rectiflow, "sample", "--model", args.export]
    command += ["--prompt", prompt, "--negative", args.negative]
    for name in ["steps", "schedule", "shift", "cfg", "seed", "batch"]:
        command += [f"--{name}", getattr(args, name)]
    command += ["--size", f"{args.width}x{args.height}", "--out", folder]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    files = sorted(path for path in folder.glob("*.png") if path.name != "grid.png")
    return stacked(Image.open(path) for path in files)


def rectiflow_sigmas(args, prediction):
    parameterization = {"flow": "flow", "epsilon": "eps", "v_prediction": "v"}[prediction]
    command = [args.rectiflow, "schedule", args.schedule, "--steps", args.steps]
    command += ["--shift", args.shift, "--parameterization", parameterization, "--json"]
    words = [str(word) for word in command]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])["sigmas"]


def load_pipeline(export):
    # Both libraries read these when imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(
        export, local_files_only=True, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    return stacked(images)


def report(name, ours, theirs):
    """Prints the differences and returns them."""
    difference = numpy.abs(ours - theirs)
    print(f"{name}: max {difference.max()}, mean {difference.mean():.4f} levels of 255")
    return difference


def failures(args, same, stock, other):
    """What the differences violate; `stock` is None where nothing is required of it."""
    if same.max() > args.tolerance:
        yield f"same sigmas differ by {same.max()}, more than {args.tolerance}"
    if stock is not None and stock.mean() > args.stock_tolerance:
        mean = f"the stock scheduler's mean difference is {stock.mean():.4f}"
        yield f"{mean}, more than {args.stock_tolerance}"
    if other.mean() < 10 * max(same.mean(), 0.01):
        yield "another prompt hardly changes the picture: this comparison shows nothing"


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("export", type=pathlib.Path)
    parser.add_argument("--rectiflow", type=pathlib.Path, default="target/release/rectiflow")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--schedule", default="simple")
    parser.add_argument("--shift", type=float, default=6.0, help="as given to the export")
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
    return parser.parse_args()


def main():
    args = arguments()
    pipe = load_pipeline(args.export)
    stock_scheduler = pipe.scheduler
    prediction = stock_scheduler.config.prediction_type.replace("flow_prediction", "flow")
    with tempfile.TemporaryDirectory() as folder:
        ours = rectiflow_pictures(args, PROMPT, pathlib.Path(folder) / "one")
        other_prompt = rectiflow_pictures(args, OTHER_PROMPT, pathlib.Path(folder) / "other")
    print(
        f"{args.export.name}: {prediction}, {args.schedule}, {args.steps} steps, "
        f"{args.width}x{args.height}, {args.batch} pictures"
    )
    pipe.scheduler = GivenSigmas(rectiflow_sigmas(args, prediction), prediction)
    same = report("same sigmas", ours, pipeline_pictures(pipe, args, PROMPT))
    pipe.scheduler = stock_scheduler
    name = f"stock {type(stock_scheduler).__name__}"
    stock = report(name, ours, pipeline_pictures(pipe, args, PROMPT))
    other = report("another prompt", ours, other_prompt)
    judged = stock if prediction == "flow" else None
    sys.exit("; ".join(failures(args, same, judged, other)) or 0)


if __name__ == "__main__":
    main()
