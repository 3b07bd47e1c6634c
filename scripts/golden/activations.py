"""Writes crates/rectiflow-sdxl/tests/golden/activations.json: what PyTorch saves in a forward pass.

    pip install -r scripts/golden/requirements.txt
    python scripts/golden/activations.py

torch.autograd.graph.saved_tensors_hooks sees every tensor that the forward pass of diffusers'
UNet2DConditionModel saves. The model is on the meta device, so that SDXL's own sizes cost nothing.
A storage counts once, for the part of the model that saves it first; parameters do not count.
Parts are named as in rectiflow's own count (crates/rectiflow-sdxl/src/cost/mod.rs).

Attention calls the kernels that a GPU takes, flash attention in bf16 and the memory-efficient one
in fp32: the default of the meta device would save every attention weight. Weights have the dtype of
the activations; latents and text need no gradient.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[2]
SDXL = "crates/rectiflow-sdxl/configs/unet"
TINY = "assets/tiny-sdxl/unet"
NESTED = "crates/rectiflow-sdxl/tests/golden/unet-nested"
# The names of parts, each with the modules that it includes.
PARTS = [
    re.compile(r"^(?:.*\.)?(?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.resnets\.\d+"),
    re.compile(r"^.*\.attentions\.\d+\.transformer_blocks\.\d+"),
    re.compile(r"^.*\.attentions\.\d+\.(?:norm|proj_out)"),
    re.compile(r"^.*\.(?:downsamplers|upsamplers)\.\d+"),
    re.compile(r"^(?:time_embedding|add_embedding|conv_in|conv_norm_out|conv_out)"),
]


def part_of(module):
    """The part that a module belongs to, by its name; `rest` where ours has no such part."""
    # Both are entrances of a transformer, and both ends of the last convolution one part.
    module = re.sub(r"(attentions\.\d+)\.proj_in$", r"\1.norm", module)
    module = re.sub(r"^(conv_act|conv_out)$", "conv_norm_out", module)
    for pattern in PARTS:
        if found := pattern.match(module):
            return found.group()
    return "rest"


class FusedAttention:
    """diffusers' AttnProcessor2_0 with the kernel named instead of chosen."""

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = [attention.to_q(hidden_states), attention.to_k(context)]
        projected.append(attention.to_v(context))
        q, k, v = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in projected)
        aten = torch.ops.aten
        if q.dtype == torch.float32:
            out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        else:
            out = aten._scaled_dot_product_flash_attention(q, k, v)[0]
        out = out.transpose(1, 2).flatten(2)
        return attention.to_out[1](attention.to_out[0](out))


class Saved:
    """Bytes of the storages that a forward pass saves, by part."""

    def __init__(self, model):
        self.bytes = {}
        self.storages = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        self.alive = []  # a storage that is freed could be taken for the next at its address
        self.stack = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self.enter(name))
            module.register_forward_hook(self.leave)

    def enter(self, name):
        return lambda *_: self.stack.append(name)

    def leave(self, *_):
        self.stack.pop()

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.alive.append(storage)
            part = part_of(self.stack[-1])
            self.bytes[part] = self.bytes.get(part, 0) + storage.nbytes()
        return tensor


def case(folder, dtype, batch, height, width, tokens):
    config = json.loads((ROOT / folder / "config.json").read_text())
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config).to(dtype)
        model.set_attn_processor(FusedAttention())
        size_dim = 6 * config["addition_time_embed_dim"]
        pooled_dim = config["projection_class_embeddings_input_dim"] - size_dim
        pooled = torch.empty(batch, pooled_dim, dtype=dtype)
        condition = {"text_embeds": pooled, "time_ids": torch.empty(batch, 6, dtype=dtype)}
        latents = torch.empty(batch, 4, height, width, dtype=dtype)
        context = torch.empty(batch, tokens, config["cross_attention_dim"], dtype=dtype)
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model(latents, torch.empty(batch, device="meta"), context, added_cond_kwargs=condition)
    return {
        "config": folder,
        "bytes_per_value": dtype.itemsize,
        "batch": batch,
        "height": height,
        "width": width,
        "tokens": tokens,
        "total_bytes": sum(saved.bytes.values()),
        "part_bytes": saved.bytes,
    }


def main():
    cases = [
        case(SDXL, torch.bfloat16, 1, 128, 128, 77),
        case(SDXL, torch.bfloat16, 16, 128, 128, 77),
        case(SDXL, torch.bfloat16, 2, 104, 152, 231),
        case(SDXL, torch.float32, 1, 128, 128, 77),
        case(TINY, torch.float32, 4, 16, 16, 77),
        case(NESTED, torch.float32, 2, 7, 10, 154),
    ]
    path = ROOT / "crates/rectiflow-sdxl/tests/golden/activations.json"
    path.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
