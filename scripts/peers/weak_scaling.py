"""Weak scaling at one and two ranks, a core each: rectiflow beside PyTorch's FSDP2 on the same UNet and shapes, in turn.

    python scripts/peers/weak_scaling.py RECTIFLOW --out FILE.jsonl [--rounds 3] [--steps 20]
    python scripts/peers/weak_scaling.py RECTIFLOW --out FILE.jsonl --rounds 0

A round runs every program once, every other round in the opposite order, and adds a line for each to FILE; medians over all
rounds in FILE are printed (with --rounds 0 nothing is run). It needs a machine that does nothing else, the demo's data
(`make demo`) and the environment of `make peers`. A round takes about four minutes.
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
# Name, whose, dtype, how often gradients are exchanged.
PROGRAMS = [
    (f"{whose}, {dtype}, `{sync}`", whose, dtype, sync)
    for dtype in ("fp32", "bf16")
    for whose, sync in (("rectiflow", "once"), ("FSDP2", "once"), ("FSDP2", "each"))
]


def last_json(command):
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}; its message is above")
    return done.stdout.strip().splitlines()


def measure(args, link, whose, dtype, sync):
    if whose == "FSDP2":
        command = [
            sys.executable,
            HERE / "bench_ranks.py",
            UNET,
            "--steps",
            args.steps,
            "--sync",
            sync,
            "--dtype",
            dtype,
        ]
        sizes = ["--micro-batches", MICRO_BATCHES, "--micro-batch", MICRO_BATCH]
        return [json.loads(line) for line in last_json([*command, *sizes])]
    command = [
        args.rectiflow,
        "--json",
        "bench",
        "ranks",
        RECIPE,
        "--steps",
        args.steps,
        "--micro-batches",
        MICRO_BATCHES,
    ]
    sets = [f"train.micro_batch={MICRO_BATCH}", f"train.dtype={dtype}", f"ranks.sharding={sync}"]
    sets = [word for key in sets for word in ("--set", key)]
    return json.loads(
        last_json([*command, "--link", link["mb_per_sec"], link["microseconds"], *sets])[-1]
    )


def table(lines):
    heads = [
        "program",
        "s a step: 1 rank",
        "2 ranks",
        "efficiency",
        "of each round",
        "predicted",
        "waiting s",
        "hidden s",
    ]
    rows = [[*heads, "MB a step, both ranks"]]
    for name, *_ in PROGRAMS:
        runs = [line["rows"] for line in lines if line["program"] == name]
        if not runs:
            continue
        median = lambda row, key: statistics.median(run[row].get(key, 0.0) for run in runs)
        by_round = ", ".join(f"{run[1]['efficiency']:.3f}" for run in runs)
        cells = [f"{median(row, 'step_secs'):.3f}" for row in (0, 1)]
        cells += [f"{median(1, 'efficiency'):.3f}", by_round]
        is_ours = "predicted" in runs[0][1]
        ours = (
            [f"{median(1, key):.3f}" for key in ("predicted", "communication_secs", "hidden_secs")]
            if is_ours
            else ["-"] * 3
        )
        rows.append([name, *cells, *ours, f"{median(1, 'loopback_step_bytes') / 1e6:.1f}"])
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rectiflow", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    read = lambda: (
        [json.loads(line) for line in args.out.read_text().splitlines()]
        if args.out.exists()
        else []
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(args.rounds):
        done = len(read()) // len(PROGRAMS)
        link = json.loads(last_json([sys.executable, HERE / "bench_ranks.py", UNET, "--wire"])[-1])
        for program in PROGRAMS if done % 2 == 0 else PROGRAMS[::-1]:
            rows = measure(args, link, *program[1:])
            with args.out.open("a") as out:
                out.write(json.dumps({"program": program[0], "link": link, "rows": rows}) + "\n")
            print(
                f"{program[0]}: {rows[1]['step_secs']:.3f} s a step of two ranks",
                file=sys.stderr,
                flush=True,
            )
    table(read())


main()
