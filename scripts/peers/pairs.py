"""Shared by the scripts that time rectiflow and a peer in turn.

A run as a process of its own, pairs of runs, medians and ratios, and the file with every number.
"""

import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys

from loaders.machine import processor


def run(command, threads):
    """Runs a program; returns the JSON of its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}; its message is above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_bytes():
    """The largest resident memory of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_turn(pairs, ours, theirs, args):
    """Both programs' runs with these arguments, by name; the first of a pair alternates."""
    runs = {ours.__name__: [], theirs.__name__: []}
    for pair in range(pairs):
        for program in [ours, theirs] if pair % 2 == 0 else [theirs, ours]:
            runs[program.__name__].append(program(args))
    return runs


def medians(runs, key):
    return {name: statistics.median(run[key] for run in found) for name, found in runs.items()}


def print_ratios(runs, speed_key):
    """Prints speed, also by pair, and memory: the first program over the second."""
    ours, theirs = runs.values()
    ratios = [a[speed_key] / b[speed_key] for a, b in zip(ours, theirs, strict=True)]
    our_speed, their_speed = medians(runs, speed_key).values()
    our_peak, their_peak = medians(runs, "peak_bytes").values()
    by_pair = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    speed, memory = our_speed / their_speed, our_peak / their_peak
    print(f"speed x{speed:.2f} (by pair {by_pair}); memory x{memory:.2f}")


def write(out, args, but, runs):
    """Writes every number, with the arguments except those named in `but`."""
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "settings": {key: value for key, value in vars(args).items() if key not in but},
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def write_between(marks, page, text):
    """Replaces what stands between the two marks of a page."""
    before, rest = page.read_text().split(marks[0])
    after = rest.split(marks[1])[1]
    page.write_text(f"{before}{marks[0]}\n{text}{marks[1]}{after}")
