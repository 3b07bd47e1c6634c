"""Writes crates/rectiflow-sdxl/tests/golden/flops.json: FLOPs as PyTorch counts them.

    pip install -r scripts/golden/requirements.txt
    python scripts/golden/flops.py

torch.utils.flop_counter.FlopCounterMode runs on diffusers' and transformers' models without weights
(meta tensors), so that SDXL's own sizes cost nothing. On meta tensors attention is decomposed into
the two matrix products that define it. A multiply-add is 2 FLOPs; norms, non-linearities, softmax
and additions are not counted. "backward" is that of a loss over the output with respect to every
parameter; latents and context need no gradient, as in training with frozen text encoders.
"recomputed" is what diffusers' activation checkpointing adds to the backward pass. PyTorch ends a
block's recomputation as soon as it has every tensor that the backward pass needs.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parents[2]
SDXL = "crates/rectiflow-sdxl/configs"
TINY = "assets/tiny-sdxl"
NESTED = "crates/rectiflow-sdxl/tests/golden"
KINDS = {
    "convolution": "convolutions",
    "convolution_backward": "convolutions",
    "mm": "products",
    "addmm": "products",
    "bmm": "attention",
    "baddbmm": "attention",
}


def count(calculate):
    """The result of `calculate`, and its FLOPs by kind."""
    with FlopCounterMode(display=False) as counter:
        result = calculate()
    flops = dict.fromkeys(["convolutions", "products", "attention"], 0)
    for operation, number in counter.get_flop_counts()["Global"].items():
        flops[KINDS[operation.__name__.split(".")[-1]]] += number
    assert sum(flops.values()) == counter.get_total_flops()
    return result, flops


def config_of(folder):
    return json.loads((ROOT / folder / "config.json").read_text())


def unet(folder, batch, height, width, tokens):
    config = config_of(folder)
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
        size_dim = 6 * config["addition_time_embed_dim"]
        pooled_dim = config["projection_class_embeddings_input_dim"] - size_dim
        pooled = torch.empty(batch, pooled_dim)
        condition = {"text_embeds": pooled, "time_ids": torch.empty(batch, 6)}
        latents = torch.empty(batch, 4, height, width)
        context = torch.empty(batch, tokens, config["cross_attention_dim"])
        inputs = (latents, torch.empty(batch), context)
    out, forward = count(lambda: model(*inputs, added_cond_kwargs=condition).sample)
    _, backward = count(lambda: out.sum().backward())
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.enable_gradient_checkpointing()
    out = model(*inputs, added_cond_kwargs=condition).sample
    _, again = count(lambda: out.sum().backward())
    return {
        "config": folder,
        "batch": batch,
        "height": height,
        "width": width,
        "tokens": tokens,
        "forward": forward,
        "backward": backward,
        "recomputed": {kind: again[kind] - backward[kind] for kind in backward},
    }


def text_encoder(folder, model_class, batch, tokens):
    with torch.device("meta"):
        model = model_class(CLIPTextConfig(**config_of(folder)))
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
    _, forward = count(lambda: model(ids))
    return {"config": folder, "batch": batch, "tokens": tokens, "forward": forward}


def vae(folder, batch, height, width):
    with torch.device("meta"):
        model = AutoencoderKL.from_config(config_of(folder))
        pixels = torch.empty(batch, 3, height, width)
    moments, encode = count(lambda: model._encode(pixels))
    _, decode = count(lambda: model._decode(moments[:, : moments.shape[1] // 2]))
    return {
        "config": folder,
        "batch": batch,
        "height": height,
        "width": width,
        "encode": encode,
        "decode": decode,
    }


def main():
    golden = {
        "unet": [
            unet(f"{SDXL}/unet", 1, 128, 128, 77),
            unet(f"{SDXL}/unet", 1, 104, 152, 231),
            unet(f"{SDXL}/unet", 16, 128, 128, 77),
            unet(f"{TINY}/unet", 4, 16, 16, 77),
            unet(f"{TINY}/unet", 3, 13, 18, 154),
            unet(f"{NESTED}/unet-nested", 2, 7, 10, 154),
        ],
        "text_encoder": [
            text_encoder(f"{SDXL}/text_encoder", CLIPTextModel, 2, 77),
            text_encoder(f"{SDXL}/text_encoder_2", CLIPTextModelWithProjection, 2, 77),
            text_encoder(f"{TINY}/text_encoder", CLIPTextModel, 3, 77),
        ],
        "vae": [
            vae(f"{SDXL}/vae", 1, 1024, 1024),
            vae(f"{TINY}/vae", 2, 128, 96),
            vae(f"{NESTED}/vae-plain", 1, 37, 64),
        ],
    }
    path = ROOT / "crates/rectiflow-sdxl/tests/golden/flops.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
