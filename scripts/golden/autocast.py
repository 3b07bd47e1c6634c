"""Makes crates/rectiflow-train/tests/golden/autocast.json: how far PyTorch's bf16 autocast is from exact gradients.

    pip install -r scripts/golden/requirements.txt
    python scripts/golden/autocast.py

The models, inputs and exact gradients (calculated in float64) are those of scripts/golden/models.py. Here diffusers' UNet
runs on fp32 weights under `torch.autocast("cpu", torch.bfloat16)`, as a user's training script does. Kept are relative L2
errors: of the output, of all gradients as one vector, and the median over the parameters.
"""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2] / "crates"
MODELS = ROOT / "rectiflow-sdxl/tests/golden"
CASE = 1


def errors(name):
    model = UNet2DConditionModel.from_pretrained(MODELS / name)
    cases, exact = (
        load_file(MODELS / name / "cases.safetensors"),
        load_file(MODELS / name / "gradients.safetensors"),
    )
    case = {
        key.split(".", 1)[1]: tensor for key, tensor in cases.items() if key.startswith(f"{CASE}.")
    }
    conditions = {"text_embeds": case["text_embeds"], "time_ids": case["time_ids"]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(
            case["sample"],
            case["timestep"],
            case["encoder_hidden_states"],
            added_cond_kwargs=conditions,
        ).sample
    torch.nn.functional.mse_loss(out.float(), case["target"]).backward()
    difference = {
        key: (p.grad.double() - exact[key].double()).norm() for key, p in model.named_parameters()
    }
    size = {key: exact[key].double().norm() for key in difference}
    relative = sorted(float(difference[key] / size[key]) for key in difference)
    total = [torch.stack(list(norms.values())).norm() for norms in (difference, size)]
    output = (out.double() - case["out"].double()).norm() / case["out"].double().norm()
    return {
        "output": float(output),
        "gradient": float(total[0] / total[1]),
        "median": relative[len(relative) // 2],
    }


torch.set_num_threads(1)
found = {name: errors(name) for name in ["unet", "unet-nested"]}
print(found)
(ROOT / "rectiflow-train/tests/golden/autocast.json").write_text(json.dumps(found, indent=1) + "\n")
