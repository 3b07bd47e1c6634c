"""Writes crates/rectiflow-train/tests/golden/autocast.json: the error of PyTorch's bf16 autocast.

    pip install -r scripts/golden/requirements.txt
    python scripts/golden/autocast.py

The models, inputs and exact gradients (calculated in float64) are those of
scripts/golden/models.py. Here diffusers' UNet runs on fp32 weights under
`torch.autocast("cpu", torch.bfloat16)`, as in a user's training script. The file has relative L2
errors: of the output, of all gradients as one vector, and the median over the parameters.
"""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2] / "crates"
MODELS = ROOT / "rectiflow-sdxl/tests/golden"
TARGET = ROOT / "rectiflow-train/tests/golden/autocast.json"
CASE = "1."


def errors(name):
    folder = MODELS / name
    model = UNet2DConditionModel.from_pretrained(folder)
    cases = load_file(folder / "cases.safetensors")
    exact = load_file(folder / "gradients.safetensors")
    case = {key.removeprefix(CASE): tensor for key, tensor in cases.items() if key.startswith(CASE)}
    conditions = {"text_embeds": case["text_embeds"], "time_ids": case["time_ids"]}
    inputs = (case["sample"], case["timestep"], case["encoder_hidden_states"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*inputs, added_cond_kwargs=conditions).sample
    torch.nn.functional.mse_loss(out.float(), case["target"]).backward()

    difference = {
        key: (p.grad.double() - exact[key].double()).norm() for key, p in model.named_parameters()
    }
    size = {key: exact[key].double().norm() for key in difference}
    relative = sorted(float(difference[key] / size[key]) for key in difference)
    total_difference = torch.stack(list(difference.values())).norm()
    total_size = torch.stack(list(size.values())).norm()
    output = (out.double() - case["out"].double()).norm() / case["out"].double().norm()
    return {
        "output": float(output),
        "gradient": float(total_difference / total_size),
        "median": relative[len(relative) // 2],
    }


def main():
    torch.set_num_threads(1)
    found = {name: errors(name) for name in ["unet", "unet-nested"]}
    print(found)
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
