"""Writes a tiny random SDXL in diffusers' layout, for comparing programs.

    python scripts/peers/tiny_model.py OUT [--vae assets/tiny-sdxl/vae]
        [--prediction flow|epsilon|v_prediction]

SDXL's topology (three levels, two text encoders, size conditioning) with the real vocabulary, which
the stock pipeline's tokenizers require. Weights are diffusers' own initial ones; those of the text
encoders and cross-attention are enlarged so that prompts matter. With a trained VAE (--vae)
differences of latents show in pixels.
"""

import argparse
import json
import pathlib
import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def unet():
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=96,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 48,
    )


def clip(width, layers, act, projection):
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        projection_dim=projection,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )


def is_enlarged(name, key):
    """Whether a parameter of component `name` decides how much the prompt matters."""
    is_embedding = "embedding" in key and name != "unet"
    return is_embedding or "attn2.to_" in key or "text_projection" in key


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--vae", type=pathlib.Path)
    parser.add_argument("--prediction", default="flow", choices=["flow", "epsilon", "v_prediction"])
    args = parser.parse_args()
    torch.manual_seed(1)
    parts = {
        "unet": unet(),
        "text_encoder": CLIPTextModel(clip(32, 3, "quick_gelu", 32)),
        # The projection is not square, so that a missing transposition fails.
        "text_encoder_2": CLIPTextModelWithProjection(clip(64, 4, "gelu", 48)),
    }
    for name, module in parts.items():
        for key, parameter in module.named_parameters():
            if is_enlarged(name, key):
                parameter.data.mul_(4)
            if name != "unet" and parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        module.save_pretrained(args.out / name)
    if args.vae:
        shutil.copytree(args.vae, args.out / "vae", dirs_exist_ok=True)
    else:
        vae().save_pretrained(args.out / "vae")
    flow = args.prediction == "flow"
    prediction = "flow_prediction" if flow else args.prediction
    scheduler = {"prediction_type": prediction, "use_flow_sigmas": flow}
    (args.out / "scheduler").mkdir(exist_ok=True)
    (args.out / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    num_parameters = sum(p.numel() for p in parts["unet"].parameters())
    print(args.out.name, num_parameters, "parameters in the UNet")


if __name__ == "__main__":
    main()
