"""What the scripts that time rectiflow and a peer in turn have in common: a run as a process of its own, pairs of runs,
medians and ratios, and the file with every number.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys


def run(command, threads):
    """Runs a program; gives the JSON of its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [str(word) for word in command], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}; its message is above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_bytes():
    """The largest resident memory of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        * 1024
    )


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
    """How much faster, by pair too, and how much memory: the first program over the second."""
    ratios = [ours[speed_key] / theirs[speed_key] for ours, theirs in zip(*runs.values())]
    (our_speed, their_speed), (ours, theirs) = (
        medians(runs, key).values() for key in [speed_key, "peak_bytes"]
    )
    by_pair = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"speed x{our_speed / their_speed:.2f} (by pair {by_pair}); memory x{ours / theirs:.2f}")


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def write(out, args, but, runs):
    """Every number, with the arguments but for those named in `but`."""
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "settings": {key: value for key, value in vars(args).items() if key not in but},
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
