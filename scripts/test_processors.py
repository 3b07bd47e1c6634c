#!/usr/bin/env python3
"""Runs the numeric tests as on other processors: fewer instructions, more threads.

    python3 scripts/test_processors.py [SETTING...]

The tests must be built already (`make test`), and cargo-nextest installed. Without SETTING, all
settings run; a setting stops after ten minutes. Prints a line for each. The exit code is 1 if a
test failed or a setting took too long.

`onednn-avx2` limits oneDNN's instructions, `mkl-avx2` MKL's (which an AMD processor ignores) and
`libtorch-avx2` those of libtorch's own loops; `avx2` all three; `two-threads` is this processor as
it is.
"""

import os
import subprocess
import sys
import time

SETTINGS = {
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "libtorch-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    "two-threads": {"RECTIFLOW_TEST_THREADS": "2", "OMP_NUM_THREADS": "2"},
}
# Networks, samplers and files of the model; optimiser, gradients and steps; whole runs.
NUMERIC = (
    "package(rectiflow-sdxl)"
    " | (package(rectiflow-train) & (test(/^(state|step|lr|measure|guard)/) | binary(runs)))"
)
LIMIT_SECS = 600


def run(name, variables):
    """Runs the tests in one setting; returns whether all passed."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    command = ["cargo", "nextest", "run", "--release", "--workspace", "--no-fail-fast"]
    command += ["-E", NUMERIC]
    began = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, check=False, timeout=LIMIT_SECS)
        outcome = "passed" if done.returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        outcome = "FAILED: longer than ten minutes"
    words = " ".join(f"{key}={value}" for key, value in variables.items())
    print(f"{name}: {outcome} in {time.monotonic() - began:.0f} s ({words})", flush=True)
    return outcome == "passed"


def main():
    chosen = sys.argv[1:] or list(SETTINGS)
    unknown = [name for name in chosen if name not in SETTINGS]
    if unknown:
        sys.exit(f"unknown setting {unknown[0]}: expected {', '.join(SETTINGS)}")
    passed = [run(name, SETTINGS[name]) for name in chosen]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
