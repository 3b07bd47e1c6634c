"""Checks at SDXL's own size, on random weights of the true shapes: memory, round trips, speed.

    python scripts/peers/full_size.py WORK [--rectiflow target/release/rectiflow]
        [--stages convert,diffusers,run,speed]

Requires target/release/examples/random_sdxl, 30 GB of disk at WORK and 16 GB of memory. The files
in WORK are kept, so that stages can run one by one; delete them by hand. Memory is the largest
resident set of the process, including pages of mapped files (getrusage of the child).

- convert: diffusers folder (fp16) -> single file -> folder; every tensor must have its bytes again;
  peaks below --max-gb.
- diffusers: the single file through diffusers' own converter, tensor by tensor (single_file.py).
- run: one UNet forward (64x64 latents) and one VAE decode in bf16, from the file.
- speed: rectiflow and diffusers in turn, 512x512, 4 steps, bf16 (bench_sample.py), once with the
  weights in memory and once with --low-memory.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
MODEL_GB = 8
PARTS = [
    "unet/diffusion_pytorch_model",
    "text_encoder/model",
    "text_encoder_2/model",
    "vae/diffusion_pytorch_model",
]


def measured(command):
    """Runs a command; returns its largest resident set in GB."""
    began = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    peak_gb = usage.ru_maxrss * 1024 / 1e9
    cpu_secs = usage.ru_utime + usage.ru_stime
    secs = time.perf_counter() - began
    words = " ".join(str(word) for word in command[1:3])
    times = f"{secs:.0f} s ({cpu_secs:.0f} s of CPU)"
    print(f"{words}: {times}, largest memory {peak_gb:.2f} GB", flush=True)
    return peak_gb


def make_model(args):
    for dtype in ["fp16", "bf16"]:
        if not (args.work / dtype).exists():
            free_gb = shutil.disk_usage(args.work).free / 1e9
            if free_gb < MODEL_GB:
                sys.exit(f"{args.work} has {free_gb:.0f} GB free; a model requires {MODEL_GB} GB")
            program = args.rectiflow.parent / "examples/random_sdxl"
            subprocess.run([program, args.work / dtype, dtype], check=True)


def data_of(path):
    """Yields the bytes after a safetensors file's header, in pieces."""
    with open(path, "rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        while piece := file.read(1 << 24):
            yield piece


def convert(args):
    folder, single, back = args.work / "fp16", args.work / "fp16.safetensors", args.work / "back"
    export = [args.rectiflow, "export", "--model", folder, "--format", "single-file"]
    export_gb = measured([*export, "--dtype", "fp16", "--out", single])
    import_gb = measured([args.rectiflow, "import", single, "--out", back])
    for part in PARTS:
        before, after = (data_of(root / f"{part}.safetensors") for root in (folder, back))
        if any(a != b for a, b in zip(before, after, strict=True)):
            sys.exit(f"{part} differs after the round trip")
    print("every tensor of the four components has the same bytes after the round trip")
    # single_file.py requires files that an export has and the random model lacks.
    shutil.rmtree(args.work / "exported", ignore_errors=True)
    back.rename(args.work / "exported")
    peak_gb = max(export_gb, import_gb)
    if peak_gb > args.max_gb:
        sys.exit(f"expected at most {args.max_gb} GB, found {peak_gb:.2f} GB")


def diffusers(args):
    command = [sys.executable, HERE / "single_file.py"]
    command += [args.work / "fp16.safetensors", args.work / "exported"]
    subprocess.run(command, check=True)


def run(args):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    inputs = {
        "unet": {
            "sample": torch.randn(1, 4, 64, 64),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 77, 2048),
            "text_embeds": torch.randn(1, 1280),
            "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]]),
        },
        "vae-decode": {"latents": torch.randn(1, 4, 64, 64)},
    }
    for part, tensors in inputs.items():
        given, result = args.work / "in.safetensors", args.work / "out.safetensors"
        save_file(tensors, given)
        files = ["--model", args.work / "bf16", "--input", given, "--output", result]
        measured([args.rectiflow, "forward", part, *files, "--dtype", "bf16"])


def speed(args):
    exported = args.work / "bf16-export"
    if not exported.exists():
        export = [args.rectiflow, "export", "--model", args.work / "bf16", "--format", "diffusers"]
        measured([*export, "--dtype", "bf16", "--out", exported])
    command = [sys.executable, HERE / "bench_sample.py", exported, "--rectiflow", args.rectiflow]
    command += ["--pairs", str(args.pairs), "--cfg", str(args.cfg), "--dtype", "bf16"]
    command += ["--steps", "4", "--size", "512x512", "--batch", "1", "--rounds", "1"]
    for name, more in {"speed-bf16": [], "speed-low-memory": ["--low-memory"]}.items():
        out = ["--out", args.out / f"{name}.json"] if args.out else []
        subprocess.run([*command, *more, *out], check=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--rectiflow", type=pathlib.Path, default="target/release/rectiflow")
    parser.add_argument("--stages", default="convert,diffusers,run,speed")
    parser.add_argument("--max-gb", type=float, default=4.0, help="limit of a conversion's memory")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cfg", type=float, default=4.5)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the speed's raw numbers")
    args = parser.parse_args()
    stages = {"convert": convert, "diffusers": diffusers, "run": run, "speed": speed}
    args.work.mkdir(parents=True, exist_ok=True)
    make_model(args)
    for name in args.stages.split(","):
        print(f"== {name}", flush=True)
        stages[name](args)


if __name__ == "__main__":
    main()
