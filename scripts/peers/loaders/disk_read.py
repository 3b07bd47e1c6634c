"""Reads passes with one engine in a process of its own; prints one JSON object.

    python scripts/peers/loaders/disk_read.py ENGINE FOLDER PASSES

Started by compare_disk.py. The clock starts after the imports; opening counts to the first pass.
"""

import importlib
import json
import pathlib
import resource
import sys
import time
import traceback

import disk_engines


def usage():
    of = resource.getrusage(resource.RUSAGE_SELF)
    return of.ru_utime + of.ru_stime, of.ru_minflt


def peak_bytes():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def read(batches, began):
    """One pass: samples, batches of several shapes, a sum of all bytes."""
    cpu_before, faults_before = usage()
    ids, num_batches, num_mixed = [], 0, 0
    for batch_ids, latents in batches:
        num_batches += 1
        num_mixed += isinstance(latents, list)
        ids += batch_ids
    secs = time.perf_counter() - began
    cpu, faults = usage()
    return {
        "samples": len(ids),
        "distinct": len(set(ids)),
        "batches": num_batches,
        "mixed_batches": num_mixed,
        "secs": secs,
        "samples_per_sec": len(ids) / secs,
        "cpu_secs": cpu - cpu_before,
        "minor_faults": faults - faults_before,
        "peak_bytes": peak_bytes(),
    }


def main():
    engine, folder, number = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    importlib.import_module(disk_engines.ENGINES[engine].package.replace("-", "_"))
    measured, error = [], None
    began = time.perf_counter()
    try:
        for batches in disk_engines.passes(engine, folder, number):
            measured.append(read(batches, began))
            began = time.perf_counter()
    except Exception as cause:
        traceback.print_exc()
        error = f"{type(cause).__name__}: {cause}"
    print(json.dumps({"passes": measured, "error": error}), flush=True)


if __name__ == "__main__":
    main()
