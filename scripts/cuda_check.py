#!/usr/bin/env python3
"""Checks the build for GPUs on a machine that may have none: `make cuda-check`.

    python3 scripts/cuda_check.py target/cuda/release/rectiflow

What it asks of the finished program:

1. `ldd` resolves libtorch_cuda and NCCL, and finds every library but the driver's own.
2. It trains a tiny UNet for three steps on the processor: the kernels for the CPU are there too.
3. Where there is no driver, `--device cuda` and a recipe's `run.device = "cuda"` are refused in one
   line that says so.
4. c10d's NCCL half is in it: the program asks libtorch for ProcessGroupNCCL.

Each line of the answer is one of these. It says nothing about a GPU: that is `make gpu`'s task.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

UNET = "assets/tiny-sdxl/unet"
RECIPE = "recipes/demo.toml"
# What the kernel module's package installs, and no wheel has.
OF_DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}


def fail(text):
    sys.exit(f"cuda-check: {text}")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_libraries(program):
    listed = output("ldd", program)
    if listed.returncode != 0:
        fail(f"ldd {program}: {listed.stderr.strip()}")
    for library in ("libtorch_cuda.so", "libnccl.so.2", "libcudnn.so.9"):
        if not re.search(rf"{re.escape(library)} => /", listed.stdout):
            fail(f"{program} does not find {library}; `ldd {program}` lists what it finds")
    missing = set(re.findall(r"(\S+) => not found", listed.stdout)) - OF_DRIVER
    if missing:
        fail(f"{program} does not find {', '.join(sorted(missing))}")
    found = re.search(r"libtorch_cuda\.so => (\S+)", listed.stdout).group(1)
    print(f"libraries   libtorch_cuda from {found}; NCCL and cuDNN are found")


def check_nccl(program):
    symbols = output("nm", "-D", "--undefined-only", program)
    if symbols.returncode != 0:
        fail(f"nm {program}: {symbols.stderr.strip()}")
    if "ProcessGroupNCCL" not in symbols.stdout:
        fail(
            f"{program} was built without NCCL: the build says which header was missing "
            "(crates/link-libtorch.rs)"
        )
    print("NCCL        linked: ProcessGroupNCCL is asked for")


def step(program, device):
    size = ["--batch", "1", "--size", "64x64", "--steps", "3"]
    return output(program, "bench", "step", "--unet", UNET, "--random", "--device", device, *size)


def check_processor(program):
    answer = step(program, "cpu")
    if answer.returncode != 0:
        fail(f"three steps on the processor: {answer.stderr.strip()}")
    print("processor   three steps of a tiny UNet")


def check_device(program):
    if Path("/proc/driver/nvidia/version").exists():
        print("device cuda this machine has a driver: not checked, see `make gpu`")
        return
    recipe = output(program, "train", RECIPE, "--set", "run.device=cuda")
    for answer in (step(program, "cuda"), recipe):
        lines = [line for line in answer.stderr.splitlines() if line.strip()]
        # Below a wrong argument stands a hint at --help.
        said = [line for line in lines if not line.startswith("For more information")]
        if answer.returncode != 2 or len(said) != 1 or "no NVIDIA driver" not in said[0]:
            fail(f"cuda without a driver: exit {answer.returncode}, {answer.stderr.strip()}")
    print(f"device cuda {said[0]}")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    program = os.path.realpath(sys.argv[1])
    check_libraries(program)
    check_nccl(program)
    check_processor(program)
    check_device(program)


if __name__ == "__main__":
    main()
