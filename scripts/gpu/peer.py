"""One training step of a UNet as a user writes it with diffusers and PyTorch, timed. One JSON line
with the keys of `rectiflow bench step --json`, or {"error": ...}.

    python3 scripts/gpu/peer.py --unet FOLDER [--batch 4] [--size 1024x1024] [--steps 6]
        [--dtype bf16] [--checkpointing] [--channels-last] [--compile] [--forward] [--device cuda]

FOLDER has config.json; weights are random. AdamW(fused=True), clip_grad_norm_, and in bf16 autocast
over fp32 weights. --forward times the forward pass alone, with weights in --dtype. The first two
steps are not timed.
"""

import argparse
import json
import pathlib
import statistics
import time

WARM_UP = 2


class Training:
    """A UNet, a batch and an optimiser."""

    def __init__(self, args, torch):
        from diffusers import UNet2DConditionModel

        self.args, self.torch = args, torch
        torch.manual_seed(0)
        config = json.loads((args.unet / "config.json").read_text())
        with torch.device(args.device):
            self.unet = UNet2DConditionModel.from_config(config)
        self.unet.requires_grad_(not args.forward).train(not args.forward)
        if args.forward and args.dtype == "bf16":
            self.unet = self.unet.to(torch.bfloat16)
        if args.channels_last:
            self.unet = self.unet.to(memory_format=torch.channels_last)
        if args.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.batch = self.random_batch(config)
        self.model = torch.compile(self.unet) if args.compile else self.unet
        self.losses, self.norms, self.optimizer = [], [], None
        if not args.forward:
            parameters = self.unet.parameters()
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True)

    def random_batch(self, config):
        torch, args = self.torch, self.args
        low = args.forward and args.dtype == "bf16"
        dtype = torch.bfloat16 if low else torch.float32

        def normal(*shape):
            return torch.randn(*shape, device=args.device, dtype=dtype)

        width, height = map(int, args.size.split("x"))
        size = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=args.device)
        text = (
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        )
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        latents = (args.batch, config["in_channels"], height // 8, width // 8)
        return {
            "sample": normal(*latents).contiguous(memory_format=layout),
            "timestep": torch.rand(args.batch, device=args.device) * 1000,
            "context": normal(args.batch, 77, config["cross_attention_dim"]),
            "text_embeds": normal(args.batch, text),
            "time_ids": size.repeat(args.batch, 1),
            "target": normal(*latents),
        }

    def predict(self):
        batch = self.batch
        conditions = {"text_embeds": batch["text_embeds"], "time_ids": batch["time_ids"]}
        return self.model(
            batch["sample"], batch["timestep"], batch["context"], added_cond_kwargs=conditions
        ).sample

    def step(self):
        torch = self.torch
        if self.args.forward:
            with torch.inference_mode():
                self.predict()
            return
        kind = self.args.device.split(":")[0]
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.args.dtype == "bf16"):
            prediction = self.predict()
        loss = torch.nn.functional.mse_loss(prediction.float(), self.batch["target"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.norms.append(norm.item())


def measure(args):
    import diffusers
    import torch

    on_gpu = args.device.startswith("cuda")
    torch.backends.cudnn.benchmark = args.channels_last
    training = Training(args, torch)
    secs = []
    for _ in range(args.steps):
        began = time.perf_counter()
        training.step()
        if on_gpu:
            torch.cuda.synchronize()
        secs.append(time.perf_counter() - began)
    timed = secs[WARM_UP:] or secs
    return {
        "steps_per_sec": 1 / statistics.median(timed),
        "step_secs": timed,
        "losses": training.losses,
        "gradient_norms": training.norms,
        "peak_bytes_of_tensors": torch.cuda.max_memory_allocated() if on_gpu else None,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--unet", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", default="1024x1024", help="width x height in pixels")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", default="cuda")
    for flag in ["checkpointing", "channels-last", "compile", "forward"]:
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    try:
        print(json.dumps(measure(args)))
    except Exception as error:
        lines = str(error).splitlines() or ["no message"]
        print(json.dumps({"error": f"{type(error).__name__}: {lines[0][:300]}"}))
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
