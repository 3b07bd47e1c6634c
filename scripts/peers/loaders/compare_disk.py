#!/usr/bin/env python3
"""Reads the same samples from a local disk with rectiflow and with three other loaders, in turn.

    python3 scripts/peers/loaders/compare_disk.py FOLDER --program side_by_side --out RUNS
        [--python VENV/bin/python] [--rounds 5] [--passes 4] [--page FILE.md] [--before PROGRAM]

FOLDER (2 GB) holds the samples, 4,000 of 20 shapes, packed by each engine in its own format. Every
run is a process of its own that reads several passes in batches of 16; its files are in the page
cache. Then one byte of the samples is flipped and each engine reads a pass: the table says whether
it noticed. Without --python, which needs the packages of scripts/peers/requirements-disk.txt and
Python 3.13, the other engines' rows say that they were not measured. PROGRAM is a side_by_side of
an older version, which is measured in the same rounds.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess

import pairs
from compare import into_page_cache
from machine import processor

HERE = pathlib.Path(__file__).parent
MARKS = [
    "<!-- scripts/peers/loaders/compare_disk.py writes from here -->",
    "<!-- to here, disk -->",
]
# Name of the row, the engine and the folder of what it reads.
ENGINES = {
    "rectiflow local": ("rectiflow, `local`", "rectiflow/disk"),
    "rectiflow window": ("rectiflow, `window`", "rectiflow/disk"),
    "before local": ("rectiflow before, `local`", "rectiflow/disk"),
    "before window": ("rectiflow before, `window`", "rectiflow/disk"),
    "webshart_buckets": ("webshart 0.6.0, BucketDataLoader", "webshart"),
    "webshart_sampler": ("webshart 0.6.0, load_sample", "webshart"),
    "ferroload": ("ferroload 0.1.1", "ferroload"),
    "dataloader_rs": ("dataloader-rs 0.2.0", "dataloader_rs"),
}
# The engines that are this program.
OWN = re.compile("rectiflow|before")
HEADS = [
    "engine",
    "samples/s, first pass",
    "later passes",
    "per CPU second",
    "page faults a sample",
    "peak memory",
    "batches of several shapes",
    "a flipped byte",
]


def command_of(args, engine, passes):
    folder = args.folder / ENGINES[engine][1]
    if OWN.match(engine):
        program = args.before if engine.startswith("before") else args.program
        return [program, "passes", folder, engine.split()[1], passes]
    return [args.python, HERE / "disk_read.py", engine, folder, passes]


def run(args, engine, passes):
    """One run's answer; an engine that fails to answer has an error instead of passes."""
    command = [str(word) for word in command_of(args, engine, passes)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"passes": [], "error": words[0] if words else f"exit code {done.returncode}"}
    return {"error": None, **json.loads(lines[-1])}


@contextlib.contextmanager
def flipped(folder):
    """Flips a bit in the middle of the largest file of latents while it lasts."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    largest = max(files, key=size_of)
    at = largest.stat().st_size // 2

    def flip():
        with largest.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    flip()
    try:
        yield
    finally:
        flip()


def size_of(path):
    return path.stat().st_size


def what_a_flip_does(args, engine):
    with flipped(args.folder / ENGINES[engine][1]):
        answer = run(args, engine, 1)
    return "an error" if answer["error"] else "delivered in silence"


def median(values, form):
    values = list(values)
    return form.format(statistics.median(values)) if values else "-"


def row(engine, answers, flip):
    """The row of an engine: medians over its runs."""
    name = ENGINES[engine][0]
    if not answers:
        return [name, "not measured: needs Python 3.13", *["-"] * (len(HEADS) - 2)]
    first = [answer["passes"][0] for answer in answers if answer["passes"]]
    later = [one for answer in answers for one in answer["passes"][1:]]
    every = first + later
    last = [answer["passes"][-1] for answer in answers if answer["passes"]]
    mixed = sorted({one.get("mixed_batches", 0) for one in first})
    return [
        name,
        median((one["samples_per_sec"] for one in first), "{:,.0f}"),
        median((one["samples_per_sec"] for one in later), "{:,.0f}"),
        median((one["samples"] / max(one["cpu_secs"], 0.01) for one in every), "{:,.0f}"),
        median((one["minor_faults"] / one["samples"] for one in first), "{:.1f}"),
        median((one["peak_bytes"] / 1e6 for one in last), "{:,.0f} MB"),
        ", ".join(map(str, mixed)),
        flip,
    ]


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--python", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument("--before", type=pathlib.Path)
    return parser.parse_args()


def pack(args, engines):
    subprocess.run(
        [args.program, "pack", args.folder / "rectiflow"], check=True, stdout=subprocess.DEVNULL
    )
    if args.python:
        subprocess.run([args.python, HERE / "disk_write.py", args.folder], check=True)
    for folder in {ENGINES[engine][1] for engine in engines}:
        into_page_cache(args.folder / folder)


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    shown = [engine for engine in ENGINES if args.before or not engine.startswith("before")]
    engines = [engine for engine in shown if args.python or OWN.match(engine)]
    pack(args, engines)
    header = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "load_before": os.getloadavg(),
    }
    answers = {engine: [] for engine in ENGINES}
    lines = [json.dumps(header)]
    # Round by round, so that other load on the machine affects all engines alike.
    for number in range(args.rounds):
        for engine in engines:
            answers[engine].append(run(args, engine, args.passes))
            line = {"engine": engine, "round": number, **answers[engine][-1]}
            lines.append(json.dumps(line))
    flips = {engine: what_a_flip_does(args, engine) for engine in engines}
    lines.append(json.dumps({"flipped_byte": flips}))
    (args.out / "disk.jsonl").write_text("".join(line + "\n" for line in lines))
    rows = [row(engine, answers[engine], flips.get(engine, "-")) for engine in shown]
    table = [HEADS, ["---"] * len(HEADS), *rows]
    heading = f"{header['date']}, {header['machine']}; medians of {args.rounds} rounds.\n\n"
    tables = heading + "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    (args.out / "disk.md").write_text(tables)
    print(tables)
    if args.page:
        pairs.write_between(MARKS, args.page, tables)


if __name__ == "__main__":
    main()
