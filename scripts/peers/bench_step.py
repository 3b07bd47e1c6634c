"""Times `rectiflow bench step` and a plain PyTorch script on the same weights and batch.

    python scripts/peers/bench_step.py --rectiflow target/release/rectiflow [--pairs 3] [--steps 12]
        [--dtype fp32] [--checkpointing] [--batch 2] [--size 64x64] [--threads 2] [--work FOLDER]
        [--out FILE.json]
    python scripts/peers/bench_step.py --check ...

--check runs 20 steps in fp32 instead: the losses must agree to 1e-4 at every step.

The UNet has SDXL's topology and 48 M random parameters; the batch is random too, the same at every
step. The peer is diffusers' UNet2DConditionModel with AdamW(fused=True), clip_grad_norm_, autocast
in bf16, and gradient checkpointing if requested. Each run is a process of its own; its first two
steps are not measured. A pair is one run of each program; the first of a pair alternates. The
output has medians over the pairs and the largest resident memory; --out writes every number.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import pairs

WARM_UP = 2
LR = 1e-4
TOLERANCE = 1e-4
CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (96, 192, 320),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 3, 5),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}


def prepare(work, args):
    """Writes the UNet and a batch to files."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    UNet2DConditionModel(**CONFIG).save_pretrained(work / "unet")
    height, width = map(int, args.size.split("x"))
    latents = (args.batch, 4, height, width)
    side = torch.tensor([8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width])
    batch = {
        "sample": torch.randn(latents),
        "timestep": torch.rand(args.batch) * 1000,
        "context": torch.randn(args.batch, 77, CONFIG["cross_attention_dim"]),
        "text_embeds": torch.randn(args.batch, 1280),
        "time_ids": side.repeat(args.batch, 1),
        "target": torch.randn(latents),
    }
    save_file(batch, work / "batch.safetensors")


def worker(args):
    """One run of the peer; prints the same keys as `rectiflow bench step --json`."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(args.threads)
    unet = diffusers.UNet2DConditionModel.from_pretrained(args.work / "unet").train()
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    batch = load_file(args.work / "batch.safetensors")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=0.1, fused=True)
    conditions = {"text_embeds": batch["text_embeds"], "time_ids": batch["time_ids"]}
    step_secs, losses = [], []
    for _ in range(args.steps):
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            prediction = unet(
                batch["sample"], batch["timestep"], batch["context"], added_cond_kwargs=conditions
            ).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), batch["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step_secs.append(time.perf_counter() - began)
    answer = {
        "steps_per_sec": 1 / statistics.median(step_secs[WARM_UP:]),
        "step_secs": step_secs[WARM_UP:],
        "losses": losses,
        "peak_bytes": pairs.peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    print(json.dumps(answer))


def rectiflow(args):
    command = [args.rectiflow, "--json", "bench", "step", "--unet", args.work / "unet", "--lr", LR]
    command += ["--input", args.work / "batch.safetensors"]
    command += ["--steps", args.steps, "--dtype", args.dtype]
    return pairs.run(command + ["--checkpointing"] * args.checkpointing, args.threads)


def diffusers(args):
    command = [sys.executable, __file__, "--worker", "--work", args.work, "--steps", args.steps]
    command += ["--dtype", args.dtype, "--threads", args.threads]
    return pairs.run(command + ["--checkpointing"] * args.checkpointing, args.threads)


def check(args):
    """Checks that both programs compute the same losses."""
    args.steps, args.dtype = 20, "fp32"
    ours, theirs = rectiflow(args)["losses"], diffusers(args)["losses"]
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(differences)
    at = differences.index(worst)
    print(
        f"20 losses, from {theirs[0]:.6f} to {theirs[-1]:.6f}: "
        f"largest relative difference {worst:.1e}, in step {at + 1}"
    )
    if worst > TOLERANCE:
        sys.exit(f"the losses differ by more than {TOLERANCE:.0e}")


def compare(args):
    runs = pairs.in_turn(args.pairs, rectiflow, diffusers, args)
    speed, peak = (pairs.medians(runs, key) for key in ["steps_per_sec", "peak_bytes"])
    checkpointing = "checkpointing" if args.checkpointing else "no checkpointing"
    batch = f"batch {args.batch} of {args.size}"
    print(f"{batch}, {args.dtype}, {checkpointing}, {args.threads} threads")
    for name in runs:
        print(f"{name}: {speed[name]:.4g} steps/s, {peak[name] / 1e9:.2f} GB")
    pairs.print_ratios(runs, "steps_per_sec")
    return runs


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rectiflow", type=pathlib.Path, default="target/release/rectiflow")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", default="64x64", help="height and width of the latents")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or pathlib.Path(folder)
        prepare(args.work, args)
        if args.check:
            check(args)
            return
        runs = compare(args)
    if args.out:
        pairs.write(args.out, args, ("rectiflow", "out", "worker", "work"), runs)


if __name__ == "__main__":
    main()
