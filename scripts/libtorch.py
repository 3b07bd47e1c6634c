#!/usr/bin/env python3
"""Prints the folder of the libtorch that rectiflow builds and runs on; fetches it if missing.

`make` calls this and exports the answer as LIBTORCH. The first of these that applies is used:

1. LIBTORCH set by the user: unchanged.
2. LIBTORCH_USE_PYTORCH=1: the installed PyTorch's folder.
3. The pinned torch wheel, fetched with pip into $XDG_CACHE_HOME/rectiflow (default
   ~/.cache/rectiflow), shared by all clones. Without an NVIDIA GPU only the files for the CPU are
   kept: of CUDA's libraries libtorch_cpu.so needs libcudart and libcupti alone, and an empty
   libtorch.so replaces the real one, which would load libtorch_cuda.so. RECTIFLOW_LIBTORCH=cpu or
   =cuda overrides the choice.

Standard output is the folder alone; progress and errors go to standard error. A second call costs
one stat. The SHA-256 of each wheel is checked before any of its files are used.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from wheels import CHOOSE_WHEEL, PIP, PYTHON_TAG, cache_folder, download, fail, once, say

# tch 0.26 binds exactly this torch.
TORCH = "2.13.0"

# Package, version, SHA-256 of the wheel. The CUDA versions are those of torch 2.13.0's cuda-toolkit
# 13.0.3.
CPU_WHEELS = [
    ("torch", TORCH, "796633c4cdf0fe2cdced72d8f88f22e73dbcfce83132763162f6d4bff13b820b"),
    (
        "nvidia-cuda-runtime",
        "13.0.96",
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    ),
    (
        "nvidia-cuda-cupti",
        "13.0.85",
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    ),
]
CPU_LIBRARIES = {
    "libtorch_cpu.so",
    "libc10.so",
    "libgomp.so.1",
    "libcudart.so.13",
    "libcupti.so.13",
}


def by_hand(packages, folder):
    """The message for a failed download: how to provide libtorch without it."""
    wanted = " ".join(f"{name}=={version}" for name, version in packages)
    return f"""could not fetch libtorch. Either
  - install torch {TORCH} yourself (`pip install torch=={TORCH}`) and run make with
    LIBTORCH_USE_PYTORCH=1,
  - or unpack a libtorch {TORCH} (C++11 ABI) and run make with LIBTORCH=/that/folder,
  - or, on a machine with access, run
      python3 -m pip download --no-deps --only-binary=:all: --python-version {PYTHON_TAG} \\
          -d wheels {wanted}
    copy the wheels to {folder} and run make again."""


def has_nvidia_gpu():
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()


def unpack_cpu(wheels, folder):
    """Writes include/ and the libraries for the CPU from the wheels to `folder`."""
    (folder / "lib").mkdir(parents=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                path = Path(entry.filename)
                if path.name in CPU_LIBRARIES and path.parent.name == "lib":
                    target = folder / "lib" / path.name
                elif path.parts[:2] == ("torch", "include") and not entry.is_dir():
                    target = folder.joinpath(*path.parts[1:])
                else:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 22)
    missing = CPU_LIBRARIES - {p.name for p in (folder / "lib").iterdir()}
    if missing:
        fail(f"the wheels lack {', '.join(sorted(missing))}")
    empty = ["cc", "-shared", "-Wl,-soname,libtorch.so", "-x", "c", "/dev/null"]
    empty += ["-o", str(folder / "lib/libtorch.so")]
    if subprocess.run(empty, check=False).returncode != 0:
        fail(
            "the C compiler `cc` could not make an empty shared object; "
            "install one (Debian: build-essential)"
        )


def install_cpu(cache, target):
    folder = cache / "wheels"
    advice = by_hand([(name, version) for name, version, _ in CPU_WHEELS], folder)
    wheels = [download(wheel, folder, "libtorch", advice) for wheel in CPU_WHEELS]
    say(f"libtorch: unpacking the CPU part to {target}")
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unpack_cpu(wheels, unfinished)
    unfinished.rename(target)
    shutil.rmtree(folder)


def install_cuda(cache, target):
    """torch with all its CUDA libraries (5 GB), in pip's layout so that its rpaths resolve."""
    say(f"libtorch: found an NVIDIA GPU, installing torch {TORCH} with CUDA to {target} (5 GB)")
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [*PIP, "install", *CHOOSE_WHEEL, "--no-compile", "--target", str(unfinished)]
    command.append(f"torch=={TORCH}")
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        fail(by_hand([("torch", TORCH)], cache / "wheels"))
    unfinished.rename(target)


def installed_pytorch():
    code = (
        "import torch, os; print(torch.__version__.split('+')[0], os.path.dirname(torch.__file__))"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        fail("LIBTORCH_USE_PYTORCH is set but `import torch` fails:\n" + answer.stderr.strip())
    version, folder = answer.stdout.strip().split(" ", 1)
    if version != TORCH:
        fail(
            f"LIBTORCH_USE_PYTORCH is set: expected torch {TORCH}, found {version}; "
            "install that version or unset the variable"
        )
    return folder


def main():
    if folder := os.environ.get("LIBTORCH"):
        if not Path(folder, "lib").is_dir():
            fail(f"LIBTORCH={folder}: expected a folder with lib/ and include/ in it")
        return folder
    if os.environ.get("LIBTORCH_USE_PYTORCH", "0") not in ("", "0"):
        return installed_pytorch()
    if (sys.platform, os.uname().machine) != ("linux", "x86_64"):
        fail(
            f"no pinned libtorch for {sys.platform} {os.uname().machine}; "
            "set LIBTORCH or LIBTORCH_USE_PYTORCH=1"
        )
    variant = os.environ.get("RECTIFLOW_LIBTORCH") or ("cuda" if has_nvidia_gpu() else "cpu")
    if variant not in ("cpu", "cuda"):
        fail(f"RECTIFLOW_LIBTORCH={variant}: expected cpu or cuda")
    cache = cache_folder()
    target = cache / f"libtorch-{TORCH}-{variant}"
    libtorch = target / "torch" if variant == "cuda" else target
    install = install_cuda if variant == "cuda" else install_cpu
    once(target, lambda: install(cache, target))
    return str(libtorch)


if __name__ == "__main__":
    print(main())
