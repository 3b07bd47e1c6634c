"""Times `rectiflow bench step` with its own memory for large tensors and with mimalloc 3 instead.

    python scripts/peers/allocators.py --rectiflow target/release/rectiflow
        --mimalloc libmimalloc.so --work FOLDER [--pairs 3] [--steps 8] [--dtype bf16]
        [--threads 2] [--out FILE.json]

FOLDER is one that scripts/peers/bench_step.py has filled (--work). The library is mimalloc's
src/static.c, compiled with MI_MALLOC_OVERRIDE as a shared object; the crate libmimalloc-sys 0.1.49
carries the sources of 3.3.2. It replaces malloc for the whole process; a limit of addresses keeps
rectiflow from reserving its own region. The third program is the C library's malloc, by the same
limit. Each run is a process of its own; which one is first alternates.
"""

import argparse
import os
import pathlib
import resource

import pairs

ADDRESSES = 48 << 30  # less than rectiflow would reserve, more than a step needs


def step(args):
    command = [args.rectiflow, "--json", "bench", "step", "--unet", args.work / "unet"]
    command += ["--input", args.work / "batch.safetensors", "--steps", args.steps]
    command += ["--dtype", args.dtype]
    return pairs.run(command, args.threads)


def own(args):
    return step(args)


def limited(args, preload):
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, before[1]))
    os.environ["LD_PRELOAD"] = preload
    try:
        return step(args)
    finally:
        del os.environ["LD_PRELOAD"]
        resource.setrlimit(resource.RLIMIT_AS, before)


def mimalloc(args):
    return limited(args, str(args.mimalloc.resolve()))


def libc(args):
    return limited(args, "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rectiflow", type=pathlib.Path, required=True)
    parser.add_argument("--mimalloc", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    runs = {program.__name__: [] for program in (own, mimalloc, libc)}
    for pair in range(args.pairs):
        order = [own, mimalloc, libc]
        for program in order if pair % 2 == 0 else order[::-1]:
            runs[program.__name__].append(program(args))
    speed, peak = (pairs.medians(runs, key) for key in ("steps_per_sec", "peak_bytes"))
    for name in runs:
        print(f"{name}: {speed[name]:.4f} steps/s, {peak[name] / 1e9:.2f} GB")
    if args.out:
        pairs.write(args.out, args, ("rectiflow", "mimalloc", "work", "out"), runs)


if __name__ == "__main__":
    main()
