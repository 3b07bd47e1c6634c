"""Writes the golden tensors of crates/rectiflow-sdxl/tests/golden/ with diffusers and transformers.

    pip install -r scripts/golden/requirements.txt
    python scripts/golden/models.py

Small models with random weights, saved by the libraries themselves, and for each a file of cases:
inputs, outputs, and for the UNets the gradients of a fixed loss with respect to every parameter.
All files are fp32, made on the CPU from fixed seeds. The calculation runs in float64 and is rounded
at the end, so that the references contain no rounding errors of their own.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parents[2] / "crates/rectiflow-sdxl/tests/golden"
MAX_FILE_BYTES = 2_000_000
# Layers whose outputs reach a norm.
BEFORE_NORMS = (
    *("conv_in", "conv2", "conv_shortcut", "proj_in", "proj_out"),
    *("to_out", "ff.net.2", "downsamplers"),
)
# Each case: batch, latent height and width, chunks of 77 tokens. Odd sizes round up when halved.
UNET_CASES = [(1, 8, 8, 1), (2, 7, 10, 2), (3, 5, 13, 3), (2, 1, 3, 1)]
TIMESTEPS = [999.0, 421.37, 0.125]
TIME_IDS = [
    [1024, 768, 0, 16, 960, 1088],
    [333, 2048, 7, 0, 512, 2048],
    [64, 64, 0, 0, 64, 64],
]


def randomise(model, seed):
    """Adds noise to every parameter: no bias is 0 and no norm the identity, so a swap shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim == 1 else float(parameter.std()) * 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def quieten(model):
    """Makes activations before the norms small: a wrong epsilon (1e-6 or 1e-5) shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(layer in name for layer in BEFORE_NORMS):
                parameter.mul_(0.02)
    return model


def normal(generator, *shape):
    return torch.randn(shape, generator=generator)


def storable(tensor):
    """A contiguous copy; floating-point numbers in fp32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype).contiguous().clone()


def save(path, tensors):
    tensors = {name: storable(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def tiny_unet(**config):
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 24),
        norm_num_groups=4,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=20,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
        **config,
    )


def unet_inputs(generator, b, h, w, chunks):
    return {
        "sample": normal(generator, b, 4, h, w),
        "timestep": torch.tensor(TIMESTEPS)[:b],
        "encoder_hidden_states": normal(generator, b, 77 * chunks, 20),
        "text_embeds": normal(generator, b, 12),
        "time_ids": torch.tensor(TIME_IDS)[:b].float(),
    }


def unet(name, seed, prepare, **config):
    torch.manual_seed(seed)
    model = tiny_unet(**config)
    prepare(randomise(model, seed)).save_pretrained(ROOT / name)
    model = model.double()
    generator = torch.Generator().manual_seed(seed + 1)
    cases, gradients = {}, {}
    for i, (b, h, w, chunks) in enumerate(UNET_CASES):
        case = unet_inputs(generator, b, h, w, chunks)
        wide = {key: tensor.double() for key, tensor in case.items()}
        # diffusers computes its sinusoids in fp32 whatever the model's dtype; so does this project.
        out = model(
            wide["sample"],
            wide["timestep"],
            wide["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": wide["text_embeds"], "time_ids": wide["time_ids"]},
        ).sample
        cases |= {f"{i}.{key}": tensor for key, tensor in case.items()} | {f"{i}.out": out}
        # Gradients of one case are enough.
        if i == 1:
            target = normal(generator, b, 4, h, w)
            cases[f"{i}.target"] = target
            torch.nn.functional.mse_loss(out, target.double()).backward()
            gradients = {key: p.grad for key, p in model.named_parameters()}
    save(ROOT / name / "cases.safetensors", cases)
    save(ROOT / name / "gradients.safetensors", gradients)


def clip(name, seed, model_class, **config):
    """Ids end their text with the largest id, whatever `eos_token_id` says."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=24,
        **config,
    )
    model = randomise(model_class(config), seed)
    model.save_pretrained(ROOT / name)
    start, end = torch.tensor([config.bos_token_id]), torch.tensor([config.vocab_size - 1])
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.full((4, 77), config.pad_token_id)
    for row, length in enumerate([0, 5, 30, 75]):
        words = torch.randint(1, config.bos_token_id, (length,), generator=generator)
        ids[row, : length + 2] = torch.cat([start, words, end])
    model = model.double()
    out = model(ids, output_hidden_states=True)
    pooled = out.text_embeds if model_class is CLIPTextModelWithProjection else out.pooler_output
    cases = {"input_ids": ids, "hidden": out.hidden_states[-2], "pooled": pooled}
    save(ROOT / name / "cases.safetensors", cases)


def vae(name, seed, prepare, **config):
    levels = len(config["block_out_channels"])
    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        scaling_factor=0.13025,
        sample_size=32,
        **config,
    )
    model = prepare(randomise(model, seed))
    model.save_pretrained(ROOT / name)
    model = model.double()
    generator = torch.Generator().manual_seed(seed + 1)
    cases = {}
    for i, (b, h, w) in enumerate([(2, 16, 24), (1, 21, 35)]):
        pixels = torch.tanh(normal(generator, b, 3, h, w))
        posterior = model.encode(pixels.double()).latent_dist
        latents = normal(generator, *posterior.mean.shape)
        cases |= {
            f"{i}.pixels": pixels,
            f"{i}.mean": posterior.mean,
            f"{i}.logvar": posterior.logvar,
            f"{i}.latents": latents,
            f"{i}.decoded": model.decode(latents.double()).sample,
        }
    save(ROOT / name / "cases.safetensors", cases)


def make_models():
    as_is = torch.nn.Identity()
    unet(
        "unet",
        10,
        as_is,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 3),
        use_linear_projection=True,
    )
    unet(
        "unet-nested",
        20,
        quieten,
        transformer_layers_per_block=(0, (1, 2), (2, 1)),
        attention_head_dim=4,
        reverse_transformer_layers_per_block=((1, 2, 1), (1, 1, 0), 1),
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-4,
    )
    ids = {"vocab_size": 64, "bos_token_id": 62}
    # The old configurations of CLIP name 2 as their end token.
    clip_l = ids | {"eos_token_id": 2, "pad_token_id": 63, "hidden_act": "quick_gelu"}
    clip_g = ids | {"eos_token_id": 63, "pad_token_id": 0, "hidden_act": "gelu"}
    clip("clip-l", 30, CLIPTextModel, **clip_l)
    clip("clip-g", 40, CLIPTextModelWithProjection, **clip_g)
    vae("vae", 50, quieten, block_out_channels=(8, 8, 16, 16), layers_per_block=2)
    vae(
        "vae-plain",
        60,
        as_is,
        block_out_channels=(8, 12),
        layers_per_block=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        latent_channels=3,
    )


def main():
    torch.set_num_threads(1)
    make_models()
    for path in sorted(ROOT.glob("*/*")):
        if path.name == "config.json":
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        assert path.stat().st_size < MAX_FILE_BYTES, f"{path} is too large to commit"
        print(f"{path.stat().st_size:>9,}  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
