"""Reads an exported single file with diffusers' own converter and compares with the exported diffusers folder.

    python scripts/peers/single_file.py MODEL.safetensors EXPORT

EXPORT (a folder that `rectiflow export --format diffusers` wrote from the same model, in the same dtype) gives the
configurations; nothing is fetched. Every tensor of the UNet, both text encoders and the VAE must be equal, bit by bit.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

single_file, folder = sys.argv[1:3]
with safe_open(single_file, "pt") as file:
    dtype = file.get_tensor("model.diffusion_model.out.2.weight").dtype
folder_pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, dtype=dtype)
single_pipe = StableDiffusionXLPipeline.from_single_file(single_file, config=folder, local_files_only=True, dtype=dtype)
failures = 0
for name in ["unet", "text_encoder", "text_encoder_2", "vae"]:
    expected = getattr(folder_pipe, name).state_dict()
    found = getattr(single_pipe, name).state_dict()
    differing = [key for key in expected if key not in found or not torch.equal(expected[key], found[key])]
    extra = sorted(set(found) - set(expected))
    print(f"{name}: {len(expected)} tensors in {dtype}, {len(differing)} differ, {len(extra)} extra")
    failures += len(differing) + len(extra)
    for key in (differing + extra)[:10]:
        print("   ", key)
sys.exit(failures > 0)
