"""Writes perturbed.safetensors of crates/rectiflow-sdxl/tests/golden/unet/: self-attention off.

    pip install -r scripts/golden/requirements.txt
    python scripts/golden/pag.py

The model and its second case are those of models.py. Perturbed-attention guidance is diffusers'
own: its PAGIdentitySelfAttnProcessor2_0 takes a batch whose second half is perturbed. "mid" is the
block that ComfyUI's node perturbs.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2] / "crates/rectiflow-sdxl/tests/golden/unet"
PARTS = {"mid": ["mid_block"], "down.2 and up.1": ["down_blocks.2", "up_blocks.1"]}
INPUTS = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]


def perturbed(case, parts):
    """The output on the case twice, with self-attention off in `parts` for the second."""
    model = UNet2DConditionModel.from_pretrained(ROOT, local_files_only=True).double()
    processors = dict(model.attn_processors)
    for name in processors:
        if ".attn1." in name and any(name.startswith(part + ".") for part in parts):
            processors[name] = PAGIdentitySelfAttnProcessor2_0()
    model.set_attn_processor(processors)
    twice = {name: torch.cat([tensor.double()] * 2) for name, tensor in case.items()}
    out = model(
        twice["sample"],
        twice["timestep"],
        twice["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": twice["text_embeds"], "time_ids": twice["time_ids"]},
    ).sample
    return out.float().contiguous()


def main():
    cases = load_file(ROOT / "cases.safetensors")
    case = {name: cases[f"1.{name}"] for name in INPUTS}
    with torch.no_grad():
        answers = {name: perturbed(case, parts) for name, parts in PARTS.items()}
    plain = answers["mid"].chunk(2)[0]
    assert (plain - cases["1.out"]).abs().max() < 1e-6, "the first half is perturbed"
    for name, answer in answers.items():
        assert (answer.chunk(2)[1] - plain).abs().max() > 1e-3, f"{name} changes nothing"
    save_file(answers, ROOT / "perturbed.safetensors", metadata={"format": "pt"})
    print({name: tuple(answer.shape) for name, answer in answers.items()})


if __name__ == "__main__":
    main()
