"""Weak scaling at one and two ranks, one core each: rectiflow beside PyTorch's FSDP2, in turn.

    python scripts/peers/weak_scaling.py RECTIFLOW --out FILE.jsonl [--rounds 3] [--steps 20]
    python scripts/peers/weak_scaling.py RECTIFLOW --out FILE.jsonl --rounds 0

Both use the same UNet and shapes. A round runs every program once, every other round in the
opposite order, and appends a line for each to FILE; the output has medians over all rounds in FILE
(with --rounds 0 nothing runs). Requires an otherwise idle machine, the demo's data (`make demo`)
and the environment of `make peers`. A round takes about four minutes.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
UNET, RECIPE = "assets/tiny-sdxl/unet", "recipes/demo.toml"
MICRO_BATCHES, MICRO_BATCH = 2, 16
# Name, program, dtype, how often gradients are exchanged.
PROGRAMS = [
    (f"{program}, {dtype}, `{sync}`", program, dtype, sync)
    for dtype in ("fp32", "bf16")
    for program, sync in (("rectiflow", "once"), ("FSDP2", "once"), ("FSDP2", "each"))
]
HEADS = [
    "program",
    "s per step: 1 rank",
    "2 ranks",
    "efficiency",
    "of each round",
    "predicted",
    "waiting s",
    "hidden s",
    "MB per step, both ranks",
]
# In rectiflow's rows only.
OURS = ("predicted", "communication_secs", "hidden_secs")


def lines_of(command):
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}; its message is above")
    return done.stdout.strip().splitlines()


def measure_link():
    command = [sys.executable, HERE / "bench_ranks.py", UNET, "--wire"]
    return json.loads(lines_of(command)[-1])


def measure_fsdp2(args, dtype, sync):
    command = [sys.executable, HERE / "bench_ranks.py", UNET, "--steps", args.steps]
    command += ["--sync", sync, "--dtype", dtype]
    command += ["--micro-batches", MICRO_BATCHES, "--micro-batch", MICRO_BATCH]
    return [json.loads(line) for line in lines_of(command)]


def measure_rectiflow(args, link, dtype, sync):
    command = [args.rectiflow, "--json", "bench", "ranks", RECIPE, "--steps", args.steps]
    command += ["--micro-batches", MICRO_BATCHES]
    command += ["--link", link["mb_per_sec"], link["microseconds"]]
    sets = [f"train.micro_batch={MICRO_BATCH}", f"train.dtype={dtype}", f"ranks.sharding={sync}"]
    for value in sets:
        command += ["--set", value]
    return json.loads(lines_of(command)[-1])


def median(runs, row, key):
    return statistics.median(run[row].get(key, 0.0) for run in runs)


def row_of(name, runs):
    """The cells of a program: medians over its rounds; row 0 has one rank, row 1 two."""
    by_round = ", ".join(f"{run[1]['efficiency']:.3f}" for run in runs)
    cells = [name]
    cells += [f"{median(runs, row, 'step_secs'):.3f}" for row in (0, 1)]
    cells += [f"{median(runs, 1, 'efficiency'):.3f}", by_round]
    is_ours = "predicted" in runs[0][1]
    cells += [f"{median(runs, 1, key):.3f}" if is_ours else "-" for key in OURS]
    cells.append(f"{median(runs, 1, 'loopback_step_bytes') / 1e6:.1f}")
    return cells


def print_table(lines):
    rows = [HEADS, ["---"] * len(HEADS)]
    for name, *_ in PROGRAMS:
        runs = [line["rows"] for line in lines if line["program"] == name]
        if runs:
            rows.append(row_of(name, runs))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_round(args):
    done = len(read_lines(args.out)) // len(PROGRAMS)
    link = measure_link()
    for name, program, dtype, sync in PROGRAMS if done % 2 == 0 else PROGRAMS[::-1]:
        if program == "FSDP2":
            rows = measure_fsdp2(args, dtype, sync)
        else:
            rows = measure_rectiflow(args, link, dtype, sync)
        with args.out.open("a") as out:
            out.write(json.dumps({"program": name, "link": link, "rows": rows}) + "\n")
        step_secs = rows[1]["step_secs"]
        print(f"{name}: {step_secs:.3f} s per step of two ranks", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rectiflow", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(args.rounds):
        run_round(args)
    print_table(read_lines(args.out))


if __name__ == "__main__":
    main()
