"""Reads an exported single file with diffusers' own converter and compares with the exported diffusers folder.

    python scripts/peers/single_file.py MODEL.safetensors EXPORT

EXPORT (a folder that `rectiflow export --format diffusers` wrote from the same model, in the same dtype) gives the
configurations and the expected tensors; nothing is fetched. Every tensor of the UNet, both text encoders and the VAE
must be equal, bit by bit. One component is in memory at a time, so that SDXL's own size is compared in 12 GB.
"""

import gc
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open

# Components that a pipeline is loaded without, so that one remains.
OTHERS = ["unet", "vae", "text_encoder", "text_encoder_2"]


def converted(single_file, folder, name, dtype):
    options = {"config": folder, "local_files_only": True}
    if name == "unet":
        return UNet2DConditionModel.from_single_file(
            single_file, subfolder=name, torch_dtype=dtype, **options
        )
    if name == "vae":
        return AutoencoderKL.from_single_file(
            single_file, subfolder=name, torch_dtype=dtype, **options
        )
    without = {other: None for other in OTHERS if other != name}
    return getattr(
        StableDiffusionXLPipeline.from_single_file(single_file, dtype=dtype, **without, **options),
        name,
    )


def compare(found, path):
    """Names that differ or are extra in `found`; a text encoder of transformers 5 lacks a prefix that files have."""
    with safe_open(path, "pt") as file:
        names = {
            name: name if name in found else name.removeprefix("text_model.")
            for name in file.keys()
        }
        differing = [
            name
            for name, own in names.items()
            if own not in found or not torch.equal(file.get_tensor(name), found[own])
        ]
    return names, differing, sorted(set(found) - set(names.values()))


def main():
    single_file, folder = sys.argv[1:3]
    with safe_open(single_file, "pt") as file:
        dtype = file.get_tensor("model.diffusion_model.out.2.weight").dtype
    failures = 0
    for name in OTHERS:
        found = converted(single_file, folder, name, dtype).state_dict()
        path = next(pathlib.Path(folder, name).glob("*.safetensors"))
        names, differing, extra = compare(found, path)
        print(
            f"{name}: {len(names)} tensors in {dtype}, {len(differing)} differ, {len(extra)} extra",
            flush=True,
        )
        failures += len(differing) + len(extra)
        for key in (differing + extra)[:10]:
            print("   ", key)
        del found
        gc.collect()
    sys.exit(failures > 0)


main()
