"""Teaches ComfyUI the sizes of the tiny SDXL, so that a CPU draws a picture in a second.

compare.py copies this file into the custom nodes of its own folder. ComfyUI reads the sizes of a
UNet from its tensors, but knows SDXL by them; the groups of norms and the sizes of text encoders
and autoencoders are constants there. Only these sizes are set here, for models as narrow as the
tiny one. What is computed with them, and every node, sampler and schedule, is ComfyUI's own.
"""

import json
import pathlib


def register():
    """Adds the sizes in sizes.json, the four configurations of a diffusers folder."""
    sizes = json.loads((pathlib.Path(__file__).parent / "sizes.json").read_text())
    import comfy.supported_models

    comfy.supported_models.models.insert(0, model_class(sizes))
    set_autoencoder(sizes["vae"])


def depths(unet):
    """Transformer blocks of each residual block on the way down."""
    found = []
    layers = zip(unet["down_block_types"], unet["transformer_layers_per_block"], strict=True)
    for kind, depth in layers:
        found += [depth if kind.startswith("CrossAttn") else 0] * unet["layers_per_block"]
    return found


def model_class(sizes):
    """ComfyUI's SDXL with other sizes."""
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
    from comfy.sdxl_clip import SDXLTokenizer
    from comfy.supported_models_base import ClipTarget

    unet = sizes["unet"]
    # diffusers calls the number of heads the width of a head.
    head_channels = unet["block_out_channels"][-1] // unet["attention_head_dim"][-1]
    # A skip connection doubles the channels of a norm.
    widest = 2 * unet["block_out_channels"][-1]
    layers = operations(comfy.ops.manual_cast, unet["norm_num_groups"], widest)
    encoder = text_encoder_class(sizes)

    class TinySDXL(comfy.supported_models.SDXL):
        unet_config = comfy.supported_models.SDXL.unet_config | {
            "model_channels": unet["block_out_channels"][0],
            "transformer_depth": depths(unet),
            "context_dim": unet["cross_attention_dim"],
            "adm_in_channels": unet["projection_class_embeddings_input_dim"],
        }
        unet_extra_config = {"num_heads": -1, "num_head_channels": head_channels}  # noqa: RUF012

        def get_model(self, state_dict, prefix="", device=None):
            self.custom_operations = layers
            model = super().get_model(state_dict, prefix, device)
            model.embedder = Timestep(unet["addition_time_embed_dim"])
            return model

        def clip_target(self, state_dict=None):
            return ClipTarget(SDXLTokenizer, encoder)

    return TinySDXL


def operations(layers, tiny_groups, widest):
    """ComfyUI's `layers`, with another number of groups in norms of at most `widest` channels."""

    class Operations(layers):
        class GroupNorm(layers.GroupNorm):
            def __init__(self, num_groups, num_channels, **options):
                groups = tiny_groups if num_channels <= widest else num_groups
                super().__init__(groups, num_channels, **options)

    return Operations


def text_encoder_class(sizes):
    """ComfyUI's pair of text encoders with other sizes."""
    import torch
    from comfy.sd1_clip import SDClipModel
    from comfy.sdxl_clip import SDXLClipG, SDXLClipModel

    configs = {
        "clip_l_model_config": sizes["text_encoder"],
        "clip_g_model_config": sizes["text_encoder_2"],
    }
    last_of_g = sizes["text_encoder_2"]["num_hidden_layers"] - 1

    class TinyClip(SDXLClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            torch.nn.Module.__init__(self)
            options = (model_options or {}) | configs
            shared = {"device": device, "dtype": dtype, "model_options": options}
            # The constructor refuses the last but one layer of two, which it can run.
            self.clip_l = SDClipModel(
                layer="hidden", layer_idx=-1, layer_norm_hidden_state=False, **shared
            )
            self.clip_l.set_clip_options({"layer": -2})
            self.clip_l.options_default = ("hidden", -2, self.clip_l.return_projected_pooled)
            self.clip_g = SDXLClipG(**shared)
            self.dtypes = {dtype}

        def load_sd(self, sd):
            """The larger encoder is known by its number of layers."""
            is_larger = f"text_model.encoder.layers.{last_of_g}.mlp.fc1.weight" in sd
            return (self.clip_g if is_larger else self.clip_l).load_sd(sd)

    return TinyClip


def set_autoencoder(vae):
    """Lets ComfyUI's autoencoder have the sizes of `vae`, where the weights have its width."""
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules import model as blocks

    widths = vae["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": vae["latent_channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    tiny_config = {"params": {"ddconfig": sizes, "embed_dim": vae["latent_channels"]}}
    blocks.ops = operations(blocks.ops, vae["norm_num_groups"], widths[-1])

    class TinyVae(comfy.sd.VAE):
        def __init__(self, sd=None, config=None, **options):
            first = (sd or {}).get("decoder.conv_in.weight")
            if first is not None and first.shape[0] == widths[-1]:
                config = tiny_config
            super().__init__(sd=sd, config=config, **options)

    comfy.sd.VAE = TinyVae
