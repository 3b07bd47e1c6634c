"""Compares an exported single file, read by diffusers' own converter, with an exported folder.

    python scripts/peers/single_file.py MODEL.safetensors EXPORT

EXPORT is a folder that `rectiflow export --format diffusers` wrote from the same model, in the same
dtype; it has the configurations and the expected tensors. Nothing is downloaded. Every tensor of
the UNet, both text encoders and the VAE must be equal, bit by bit. One component is in memory at a
time, so that SDXL's own size needs 12 GB.
"""

import gc
import os
import pathlib
import sys

import torch
from safetensors import safe_open

COMPONENTS = ["unet", "vae", "text_encoder", "text_encoder_2"]


def converted(single_file, folder, name, dtype):
    """One component of the single file."""
    # Both libraries read these when imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    options = {"config": folder, "local_files_only": True}
    if name in ("unet", "vae"):
        model_class = UNet2DConditionModel if name == "unet" else AutoencoderKL
        return model_class.from_single_file(
            single_file, subfolder=name, torch_dtype=dtype, **options
        )
    # A text encoder is read by the pipeline, loaded without the others.
    without = {other: None for other in COMPONENTS if other != name}
    pipeline = StableDiffusionXLPipeline.from_single_file(
        single_file, dtype=dtype, **without, **options
    )
    return getattr(pipeline, name)


def compare(found, path):
    """The names of the file's tensors, those that differ, and those only in `found`.

    Text encoders of transformers 5 lack a prefix that names in files have.
    """
    with safe_open(path, "pt") as file:
        names = {
            name: name if name in found else name.removeprefix("text_model.")
            for name in file.keys()  # noqa: SIM118 (not a dict)
        }
        differing = [
            name
            for name, own in names.items()
            if own not in found or not torch.equal(file.get_tensor(name), found[own])
        ]
    return names, differing, sorted(set(found) - set(names.values()))


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    single_file, folder = sys.argv[1:]
    with safe_open(single_file, "pt") as file:
        dtype = file.get_tensor("model.diffusion_model.out.2.weight").dtype
    failures = 0
    for name in COMPONENTS:
        found = converted(single_file, folder, name, dtype).state_dict()
        path = next(pathlib.Path(folder, name).glob("*.safetensors"))
        names, differing, extra = compare(found, path)
        counts = f"{len(differing)} differ, {len(extra)} extra"
        print(f"{name}: {len(names)} tensors in {dtype}, {counts}", flush=True)
        failures += len(differing) + len(extra)
        for key in (differing + extra)[:10]:
            print("   ", key)
        del found
        gc.collect()
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
