#!/usr/bin/env python3
"""Trains the demo's tiny VAE (assets/tiny-sdxl/vae): SDXL's topology, small enough for a CPU.

    pip install -r scripts/requirements-training.txt
    python3 scripts/train_tiny_vae.py assets/emoji/emoji.tar assets/tiny-sdxl/vae

Using rectiflow does not require this script: the weights are committed. One process per core, each
with one thread: convolutions this small gain nothing from threads. Most steps see crops, which stay
in cache and take half the time per pixel; the last ones see whole pictures, for the statistics of
the group norms. A little noise is added to the latents before decoding, which makes the decoder
smooth: small errors of a diffusion model stay small in the picture. At the end the latents' mean
and deviation are folded into the two adjacent 1x1 convolutions, so that SDXL's scaling factor
0.13025 is correct for this VAE too.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

import emoji_subjects as emoji

SCALING_FACTOR = 0.13025
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    # Few channels where pixels are many: at full size 8 cost a tenth of 32, and the bottleneck
    # limits the quality anyway.
    "block_out_channels": [8, 16, 32, 64],
    "layers_per_block": 1,
    # 4 channels per group at full size, as in SDXL (128 / 32). Smaller groups lose a plain colour.
    "norm_num_groups": 2,
    "act_fn": "silu",
    "sample_size": 128,
    "scaling_factor": SCALING_FACTOR,
}
CROP_PX = 64
# Relative to a latent channel's standard deviation.
LATENT_NOISE = 0.1
# Share of the steps that see whole pictures.
WHOLE_SHARE = 0.2


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=8, help="crops per process and step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights of an earlier run (its out/last.pt)")
    return parser.parse_args()


def crop(subjects, rng):
    """A random crop of a randomly scaled picture around a point near the subject's middle.

    [3, CROP_PX, CROP_PX].
    """
    subject = subjects[rng.integers(len(subjects))]
    scale = math.sqrt(emoji.AREA_PX / (subject.width * subject.height)) / emoji.MARGIN
    picture = emoji.compose(subject, emoji.draw_background(rng), scale * rng.uniform(0.8, 1.25))
    pad = CROP_PX // 2
    x, y = (int(rng.integers(side // 8, side - side // 8)) for side in picture.size)
    corner = picture.getpixel((0, 0))
    canvas = Image.new("RGB", (CROP_PX, CROP_PX), corner)
    canvas.paste(picture, (pad - x, pad - y))
    if rng.integers(2):
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return emoji.to_array(canvas)


def whole(subjects, rng, size):
    """Draws `size` whole pictures and returns those in the first one's bucket.

    A batch has one shape; most pictures are square.
    """
    arrays = []
    for _ in range(size):
        subject = subjects[rng.integers(len(subjects))]
        arrays.append(bucketed(subject, emoji.draw_background(rng)))
    shape = arrays[0].shape
    return np.stack([a for a in arrays if a.shape == shape])


def bucketed(subject, background):
    """A subject on a background at its bucket, [3, h, w] float32 in [-1, 1]."""
    return emoji.to_array(emoji.at_bucket(emoji.compose(subject, background)))


def batch(subjects, rng, step, args):
    if step < args.steps * (1 - WHOLE_SHARE):
        arrays = np.stack([crop(subjects, rng) for _ in range(args.batch)])
    else:
        arrays = whole(subjects, rng, max(1, args.batch // 2))
    return torch.from_numpy(arrays).to(memory_format=torch.channels_last)


def loss_of(vae, pixels):
    """MSE, plus some L1 and differences of neighbouring pixels for crisp edges."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pixels).latent_dist.mean.float()
        deviation = latents.detach().std(dim=(0, 2, 3), keepdim=True)
        noisy = latents + LATENT_NOISE * deviation * torch.randn_like(latents)
        decoded = vae.decode(noisy).sample.float()
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    # Keeps the latents near unit variance without shaping them; folding makes it exact.
    size = (latents.pow(2).mean() - 1).clamp(min=0)
    return error.pow(2).mean() + 0.1 * error.abs().mean() + 0.1 * edges + 1e-3 * size


def rate(step, args):
    """The learning rate: warm-up over 200 steps, times a cosine to 0."""
    return args.lr * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def join(rank, args):
    """Joins the process group; the processes meet at a file."""
    meeting = f"file://{args.out.resolve()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)


def share_gradients(parameters, processes):
    """Averages the gradients of all processes."""
    # The posterior's variance is in no loss, but needs a gradient to be shared.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= processes
    parts = flat.split([p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, parts, strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))


def train(rank, args):
    """Trains in one process; rank 0 reports and writes the averaged weights every 500 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.processes > 1:
        join(rank, args)
    train_subjects, held_out = emoji.load(args.archive)
    vae = AutoencoderKL(**CONFIG)
    if args.start:
        vae.load_state_dict(torch.load(args.start))
    vae.to(memory_format=torch.channels_last)
    average = copy.deepcopy(vae).requires_grad_(False)
    parameters = list(vae.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    rng = np.random.default_rng([args.seed, rank])
    torch.manual_seed(args.seed * 1000 + rank)
    began, running = time.time(), 0.0
    for step in range(args.steps):
        # One update: gradients of all processes, clipped, at this step's rate.
        for group in optimiser.param_groups:
            group["lr"] = rate(step, args)
        loss = loss_of(vae, batch(train_subjects, rng, step, args))
        optimiser.zero_grad()
        loss.backward()
        share_gradients(parameters, args.processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        # The average of the weights follows, at first more closely.
        keep = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), parameters, 1 - keep)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if rank == 0 and step % 50 == 49:
            secs = time.time() - began
            print(f"step {step + 1}/{args.steps} loss {running:.4f} {secs:.0f} s", flush=True)
        if rank == 0 and (step % 500 == 499 or step + 1 == args.steps):
            torch.save(average.state_dict(), args.out / "last.pt")
            on_black = psnr(average, held_out[:16], (0, 0, 0))
            on_white = psnr(average, held_out[:16], (255, 255, 255))
            mean = np.mean(on_black + on_white)
            print(f"step {step + 1} held-out PSNR {mean:.2f} dB", flush=True)
    if rank == 0:
        finish(average, train_subjects, held_out, args.out, time.time() - began)
    if args.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def round_trip(vae, pixels):
    """The decoded mean of the posterior."""
    return vae.decode(vae.encode(pixels).latent_dist.mean).sample


def eight_bit(pixels):
    """From [-1, 1] to whole numbers in [0, 255]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round()


@torch.no_grad()
def psnr(vae, subjects, background):
    """The PSNR of each picture at its bucket, over 8-bit values, in dB."""
    values = []
    for subject in subjects:
        pixels = torch.from_numpy(bucketed(subject, background))[None]
        error = eight_bit(round_trip(vae, pixels)) - eight_bit(pixels)
        values.append(10 * math.log10(255**2 / max(1e-3, error.pow(2).mean())))
    return values


@torch.no_grad()
def statistics(vae, subjects):
    """Mean and deviation of each latent channel, over each subject on one random background."""
    rng = np.random.default_rng(1)
    rows = []
    for subject in subjects:
        pixels = torch.from_numpy(bucketed(subject, emoji.draw_background(rng)))
        rows.append(vae.encode(pixels[None]).latent_dist.mean.flatten(2)[0])
    values = torch.cat(rows, dim=1).double()
    return values.mean(dim=1), values.std(dim=1)


@torch.no_grad()
def fold(vae, mean, deviation):
    """Makes latents * SCALING_FACTOR zero-mean, unit-variance; decode(encode(x)) is unchanged."""
    mean, unit = mean.float(), (deviation * SCALING_FACTOR).float()
    quant, post = vae.quant_conv, vae.post_quant_conv
    num = len(mean)
    quant.weight[:num].div_(unit.view(-1, 1, 1, 1))
    quant.bias[:num].sub_(mean).div_(unit)
    # The posterior's log-variance: that of the noise the decoder was trained with.
    quant.weight[num:] = 0
    quant.bias[num:] = 2 * math.log(LATENT_NOISE / SCALING_FACTOR)
    post.bias.add_(post.weight[:, :, 0, 0] @ mean)
    post.weight.mul_(unit.view(1, -1, 1, 1))


@torch.no_grad()
def finish(vae, subjects, held_out, out, seconds):
    """Folds, checks the folding, rounds to fp16, measures the rounded VAE and writes it."""
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    sample = torch.from_numpy(bucketed(held_out[0], (255, 255, 255)))[None]
    before = round_trip(vae, sample)
    fold(vae, *statistics(vae, subjects))
    moved = (round_trip(vae, sample) - before).abs().max().item()
    assert moved < 1e-4, f"folding changed a decoded picture by {moved}"
    vae.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})
    mean, deviation = (value * SCALING_FACTOR for value in statistics(vae, subjects))
    assert mean.abs().max() < 0.02 and (deviation - 1).abs().max() < 0.02, (mean, deviation)
    report = {
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "folding_changes_pixels_by": moved,
        "scaled_latents_mean": mean.tolist(),
        "scaled_latents_deviation": deviation.tolist(),
        "held_out_subjects": len(held_out),
    }
    for name, colour in emoji.BACKGROUNDS.items():
        values = psnr(vae, held_out, colour)
        mean_db, lowest_db = round(np.mean(values), 2), round(min(values), 2)
        report[f"psnr_db_{name}"] = {"mean": mean_db, "lowest": lowest_db}
    weights = {name: value.half().contiguous() for name, value in vae.state_dict().items()}
    save_file(weights, out / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = {"_class_name": "AutoencoderKL", **CONFIG, "force_upcast": False}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def main():
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "meeting").unlink(missing_ok=True)
    if args.processes == 1:
        train(0, args)
    else:
        mp.spawn(train, (args,), nprocs=args.processes)
    (args.out / "meeting").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
