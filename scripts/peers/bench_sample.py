"""Times `rectiflow bench sample` and diffusers' stock SDXL pipeline on the same weights.

    python scripts/peers/bench_sample.py EXPORT --rectiflow target/release/rectiflow [--pairs 3]
        [--steps 28] [--size 128x128] [--batch 4] [--rounds 3] [--dtype fp32] [--threads 2]
        [--low-memory] [--out FILE.json]

EXPORT is a folder that `rectiflow export --format diffusers` wrote. Nothing is downloaded. Each run
is a process of its own: it loads the model, encodes the prompt, drops the text encoders, draws one
batch to warm up and then --rounds measured batches, from noise to pixels. A pair is one run of each
program; the first of a pair alternates. The output has the medians over the pairs and both
programs' largest resident memory; --out writes every number. --low-memory applies to rectiflow
only.
"""

import argparse
import gc
import json
import os
import pathlib
import statistics
import sys
import time

import pairs

PROMPT = "a red apple on a white background"
SETTINGS = ["steps", "size", "batch", "rounds", "cfg", "dtype"]
# What encode_prompt returns.
EMBEDDINGS = [
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
]


def load_pipeline(args):
    import diffusers
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    load = diffusers.StableDiffusionXLPipeline.from_pretrained
    pipe = load(args.export, local_files_only=True, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_batches(pipe, args, embeddings):
    """The seconds of each batch, the warm-up first."""
    import torch

    width, height = map(int, args.size.split("x"))
    batch_secs = []
    for seed in range(args.rounds + 1):
        began = time.perf_counter()
        pipe(
            **embeddings,
            num_inference_steps=args.steps,
            guidance_scale=args.cfg,
            width=width,
            height=height,
            generator=torch.manual_seed(seed),
            output_type="np",
        )
        batch_secs.append(time.perf_counter() - began)
    return batch_secs


def worker(args):
    """One run of diffusers; prints the same keys as `rectiflow bench sample --json`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import diffusers
    import torch

    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    pipe = load_pipeline(args)
    load_secs = time.perf_counter() - began
    with torch.inference_mode():
        began = time.perf_counter()
        encoded = pipe.encode_prompt(PROMPT, negative_prompt="", num_images_per_prompt=args.batch)
        encode_secs = time.perf_counter() - began
        pipe.text_encoder = pipe.text_encoder_2 = None
        gc.collect()
        batch_secs = draw_batches(pipe, args, dict(zip(EMBEDDINGS, encoded, strict=True)))
    answer = {
        "images_per_sec": args.batch / statistics.median(batch_secs[1:]),
        "batch_secs": batch_secs[1:],
        "warm_up_secs": batch_secs[0],
        "encode_secs": encode_secs,
        "load_secs": load_secs,
        "peak_bytes": pairs.peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    print(json.dumps(answer))


def rectiflow(args):
    command = [args.rectiflow, "bench", "sample", "--json"]
    command += ["--model", args.export, "--prompt", PROMPT]
    for name in SETTINGS:
        command += [f"--{name}", getattr(args, name)]
    if args.low_memory:
        command += ["--low-memory"]
    return pairs.run(command, args.threads)


def diffusers(args):
    command = [sys.executable, __file__, args.export, "--worker"]
    for name in [*SETTINGS, "threads"]:
        command += [f"--{name}", getattr(args, name)]
    return pairs.run(command, args.threads)


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("export", type=pathlib.Path)
    parser.add_argument("--rectiflow", type=pathlib.Path, default="target/release/rectiflow")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cfg", type=float, default=4.5)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.worker:
        worker(args)
        return
    runs = pairs.in_turn(args.pairs, rectiflow, diffusers, args)
    speed, peak, load = (
        pairs.medians(runs, key) for key in ["images_per_sec", "peak_bytes", "load_secs"]
    )
    print(
        f"{args.size}, {args.steps} steps, batch {args.batch}, cfg {args.cfg}, {args.dtype}, "
        f"{args.threads} threads"
    )
    for name in runs:
        numbers = f"{speed[name]:.4g} images/s, {peak[name] / 1e9:.2f} GB"
        print(f"{name}: {numbers}, loaded in {load[name]:.1f} s")
    pairs.print_ratios(runs, "images_per_sec")
    if args.out:
        pairs.write(args.out, args, ("export", "rectiflow", "out", "worker"), runs)


if __name__ == "__main__":
    main()
