"""Writes crates/rectiflow-sdxl/tests/golden/discrete.json: numbers of diffusers' DDPMScheduler.

    python scripts/golden/discrete.py

SDXL's schedule (scaled linear, 0.00085 to 0.012): alphas_cumprod, add_noise and get_velocity on a
tiny tensor, and the min-SNR weights of diffusers' training code.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

TARGET = Path("crates/rectiflow-sdxl/tests/golden/discrete.json")


def flat(tensor):
    return [float(value) for value in tensor.flatten()]


def main():
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
    )
    generator = torch.Generator().manual_seed(1)
    steps = torch.tensor([0, 1, 499, 998, 999])
    x0 = torch.randn(5, 4, 2, 1, generator=generator)
    noise = torch.randn(5, 4, 2, 1, generator=generator)
    snr = compute_snr(scheduler, steps)
    clipped = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    golden = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "alphas_cumprod": flat(scheduler.alphas_cumprod),
        "steps": steps.tolist(),
        "shape": list(x0.shape),
        "x0": flat(x0),
        "noise": flat(noise),
        "noised": flat(scheduler.add_noise(x0, noise, steps)),
        "velocity": flat(scheduler.get_velocity(x0, noise, steps)),
        "min_snr_5_eps": flat(clipped / snr),
        "min_snr_5_v": flat(clipped / (snr + 1)),
    }
    TARGET.write_text(json.dumps(golden) + "\n")
    print(TARGET, TARGET.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
