"""Processor time of a training step, alone and beside four busy processes, by how threads wait.

    python scripts/peers/busy.py RECTIFLOW WORK [--rounds 3] [--out FILE.json]

WORK is a folder that scripts/peers/bench_step.py has filled (--work). Each round runs every setting
once alone and once beside four busy loops, four steps of the 48 M UNet in fp32 each time. Prints
the medians of steps/s and of processor seconds, with one setting of OpenMP's waiting a line: the
command's own choice, libgomp's default, and threads that sleep at once. --out writes every number.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

import pairs

BUSY = 4
SETTINGS = {
    "rectiflow's own": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def run(args, variables, num_busy):
    """Steps a second and processor seconds of one run."""
    loops = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loops) for _ in range(num_busy)]
    command = [args.rectiflow, "--json", "bench", "step", "--unet", f"{args.work}/unet"]
    command += ["--lr", "1e-4", "--input", f"{args.work}/batch.safetensors"]
    command += ["--steps", "4", "--dtype", "fp32"]
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "2"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, env=environment, **pipe)
        answer = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
    finally:
        for each in busy:
            each.kill()
            each.wait()
    if status != 0:
        sys.exit(f"{command[0]} bench step failed with status {status}")
    seconds = used.ru_utime + used.ru_stime
    return {"steps_per_sec": json.loads(answer)["steps_per_sec"], "processor_secs": seconds}


def median(runs, key):
    return statistics.median(each[key] for each in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rectiflow")
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    runs = {name: {"alone": [], "beside": []} for name in SETTINGS}
    for _ in range(args.rounds):
        for name, variables in SETTINGS.items():
            runs[name]["alone"].append(run(args, variables, 0))
            runs[name]["beside"].append(run(args, variables, BUSY))
    for name, found in runs.items():
        alone, beside = (found[where] for where in ("alone", "beside"))
        ratio = median(beside, "processor_secs") / median(alone, "processor_secs")
        print(
            f"{name}: alone {median(alone, 'steps_per_sec'):.3f}/s "
            f"{median(alone, 'processor_secs'):.1f} s, beside {BUSY} "
            f"{median(beside, 'steps_per_sec'):.3f}/s {median(beside, 'processor_secs'):.1f} s, "
            f"ratio {ratio:.2f}",
            flush=True,
        )
    if args.out:
        pairs.write(args.out, args, {"rectiflow", "work", "out"}, runs)


if __name__ == "__main__":
    main()
