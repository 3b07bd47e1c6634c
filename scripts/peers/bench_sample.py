"""Times `rectiflow bench sample` and diffusers' stock StableDiffusionXLPipeline in turn, on the same weights.

    python scripts/peers/bench_sample.py EXPORT --rectiflow target/release/rectiflow [--pairs 3] [--steps 28]
        [--size 128x128] [--batch 4] [--rounds 3] [--dtype fp32] [--threads 2] [--out FILE.json]

EXPORT is a folder that `rectiflow export --format diffusers` wrote. Nothing is fetched. Each run is a process of its
own that loads the model, encodes the prompt, drops the text encoders, draws one batch to warm up and --rounds that
count, from noise to pixels. A pair is one run of each program, the first of a pair alternating. Printed are the medians
over the pairs, and both programs' largest resident memory; --out keeps every number.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

PROMPT = "a red apple on a white background"


def worker(args):
    """One run of diffusers; prints what `rectiflow bench sample --json` prints."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import gc

    import diffusers
    import torch

    torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    width, height = map(int, args.size.split("x"))
    began = time.perf_counter()
    load = diffusers.StableDiffusionXLPipeline.from_pretrained
    pipe = load(args.export, local_files_only=True, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    load_secs = time.perf_counter() - began
    with torch.inference_mode():
        began = time.perf_counter()
        embeds = pipe.encode_prompt(PROMPT, negative_prompt="", num_images_per_prompt=args.batch)
        encode_secs = time.perf_counter() - began
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        pipe.text_encoder = pipe.text_encoder_2 = None
        gc.collect()
        batch_secs = []
        for seed in range(args.rounds + 1):
            began = time.perf_counter()
            pipe(
                **dict(zip(names, embeds)),
                num_inference_steps=args.steps,
                guidance_scale=args.cfg,
                width=width,
                height=height,
                generator=torch.manual_seed(seed),
                output_type="np",
            )
            batch_secs.append(time.perf_counter() - began)
    status = pathlib.Path("/proc/self/status").read_text()
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    print(
        json.dumps(
            {
                "images_per_sec": args.batch / statistics.median(batch_secs[1:]),
                "batch_secs": batch_secs[1:],
                "warm_up_secs": batch_secs[0],
                "encode_secs": encode_secs,
                "load_secs": load_secs,
                "peak_bytes": peak_kib * 1024,
                "threads": torch.get_num_threads(),
                "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            }
        )
    )


def run(command, threads):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run([str(word) for word in command], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}; its message is above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rectiflow(args):
    command = [args.rectiflow, "bench", "sample", "--json", "--model", args.export, "--prompt", PROMPT]
    for name in ["steps", "size", "batch", "rounds", "cfg", "dtype"]:
        command += [f"--{name}", getattr(args, name)]
    return run(command, args.threads)


def diffusers(args):
    command = [sys.executable, __file__, args.export, "--worker"]
    for name in ["steps", "size", "batch", "rounds", "cfg", "dtype", "threads"]:
        command += [f"--{name}", getattr(args, name)]
    return run(command, args.threads)


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    runs = {"rectiflow": [], "diffusers": []}
    for pair in range(args.pairs):
        programs = [rectiflow, diffusers] if pair % 2 == 0 else [diffusers, rectiflow]
        for program in programs:
            runs[program.__name__].append(program(args))
    speed, peak, load = (
        {name: statistics.median(run[key] for run in found) for name, found in runs.items()}
        for key in ["images_per_sec", "peak_bytes", "load_secs"]
    )
    ratios = [ours["images_per_sec"] / theirs["images_per_sec"] for ours, theirs in zip(*runs.values())]
    print(f"{args.size}, {args.steps} steps, batch {args.batch}, cfg {args.cfg}, {args.dtype}, {args.threads} threads")
    for name in runs:
        print(f"{name}: {speed[name]:.4g} images/s, {peak[name] / 1e9:.2f} GB, loaded in {load[name]:.1f} s")
    by_pair = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"speed x{speed['rectiflow'] / speed['diffusers']:.2f} (by pair {by_pair})", end="; ")
    print(f"memory x{peak['rectiflow'] / peak['diffusers']:.2f}")
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("export", "rectiflow", "out", "worker")}
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores of {processor()}",
            "settings": settings,
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


main()
