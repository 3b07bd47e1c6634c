"""Writes crates/rectiflow-sdxl/tests/golden/scheduler_configs.json: files and numbers of diffusers.

    python scripts/golden/scheduler_configs.py

The text of `scheduler_config.json` as each scheduler of the SDXL pipeline saves it, with SDXL's
settings, for models that predict noise, v, v with zero terminal SNR, and a flow where the class has
flow sigmas. For zero terminal SNR also alphas_cumprod, add_noise and get_velocity of DDPMScheduler,
and the sigmas of EulerDiscreteScheduler.
"""

import inspect
import json
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

TARGET = Path("crates/rectiflow-sdxl/tests/golden/scheduler_configs.json")
SDXL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
KINDS = {
    "eps": {"prediction_type": "epsilon"},
    "v": {"prediction_type": "v_prediction"},
    "v_ztsnr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
}


def saved_text(scheduler):
    """The text of the file that a scheduler saves."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        return (Path(folder) / "scheduler_config.json").read_text()


def texts():
    """Yields name, kind and text for each class and each kind of model that it has settings for."""
    for name in sorted(entry.name for entry in KarrasDiffusionSchedulers):
        scheduler = getattr(diffusers, name)
        accepted = inspect.signature(scheduler.__init__).parameters
        for kind, settings in KINDS.items():
            # These two have defaults of their own that `epsilon` contradicts, or need a package.
            if not set(settings) <= set(accepted) or name.startswith("EDM"):
                continue
            try:
                yield name, kind, saved_text(scheduler(**SDXL, **settings))
            except (ImportError, NotImplementedError, ValueError):
                continue
    for name in ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]:
        yield name, None, saved_text(getattr(diffusers, name)())
    for name in ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]:
        yield name, "flow", saved_text(getattr(diffusers, name)(shift=3.0))


def flat(tensor):
    return [float(value) for value in tensor.flatten()]


def zero_terminal_snr():
    rescaled = {**SDXL, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = diffusers.DDPMScheduler(**rescaled, clip_sample=False)
    euler = diffusers.EulerDiscreteScheduler(**rescaled, timestep_spacing="trailing")
    generator = torch.Generator().manual_seed(2)
    steps = torch.tensor([0, 1, 499, 998, 999])
    x0 = torch.randn(5, 4, 2, 1, generator=generator)
    noise = torch.randn(5, 4, 2, 1, generator=generator)
    alphas = euler.alphas_cumprod.double()
    return {
        "alphas_cumprod": flat(scheduler.alphas_cumprod),
        "sigmas": flat(((1 - alphas) / alphas) ** 0.5),
        "steps": steps.tolist(),
        "shape": list(x0.shape),
        "x0": flat(x0),
        "noise": flat(noise),
        "noised": flat(scheduler.add_noise(x0, noise, steps)),
        "velocity": flat(scheduler.get_velocity(x0, noise, steps)),
    }


def main():
    files = [{"class": name, "predicts": kind, "text": text} for name, kind, text in texts()]
    golden = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "files": files,
        "zero_terminal_snr": zero_terminal_snr(),
    }
    TARGET.write_text(json.dumps(golden) + "\n")
    print(TARGET, len(files), "files,", TARGET.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
