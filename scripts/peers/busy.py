"""Processor time of a training step, alone and beside four busy processes, by how threads wait.

    python scripts/peers/busy.py RECTIFLOW WORK

WORK is a folder that scripts/peers/bench_step.py has filled (--work). Prints steps/s and processor
seconds of four steps, with one setting of OpenMP's waiting a line.
"""

import json
import os
import resource
import subprocess
import sys

BUSY = 4
SETTINGS = [
    {"GOMP_SPINCOUNT": "300000"},
    {"GOMP_SPINCOUNT": "10000"},
    {"GOMP_SPINCOUNT": "5000"},
    {"GOMP_SPINCOUNT": "3000"},
    {"OMP_WAIT_POLICY": "passive"},
]


def run(program, work, variables, num_busy):
    """Steps a second and processor seconds of one run."""
    loops = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loops) for _ in range(num_busy)]
    command = [program, "--json", "bench", "step", "--unet", f"{work}/unet", "--lr", "1e-4"]
    command += ["--input", f"{work}/batch.safetensors", "--steps", "4", "--dtype", "fp32"]
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "2"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, env=environment, **pipe)
        answer = json.loads(process.stdout.read())
        _, _, used = os.wait4(process.pid, 0)
    finally:
        for each in busy:
            each.kill()
            each.wait()
    assert isinstance(used, resource.struct_rusage)
    return answer["steps_per_sec"], used.ru_utime + used.ru_stime


def main():
    program, work = sys.argv[1:]
    for variables in SETTINGS:
        alone, beside = (run(program, work, variables, num_busy) for num_busy in (0, BUSY))
        ratio = beside[1] / alone[1]
        print(
            f"{variables}: alone {alone[0]:.3f}/s {alone[1]:.1f} s, "
            f"beside {BUSY} {beside[0]:.3f}/s {beside[1]:.1f} s, ratio {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
