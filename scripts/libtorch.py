#!/usr/bin/env python3
"""Prints the folder of the libtorch that rectiflow builds and runs on; fetches it if missing.

`make` calls this and exports the answer as LIBTORCH. The first of these that applies is used:

1. LIBTORCH set by the user: unchanged.
2. LIBTORCH_USE_PYTORCH=1: the installed PyTorch's folder.
3. The pinned torch wheel, fetched with pip into $XDG_CACHE_HOME/rectiflow (default
   ~/.cache/rectiflow), shared by all clones. Without an NVIDIA GPU only the files for the CPU are
   kept: of CUDA's libraries libtorch_cpu.so needs libcudart and libcupti alone, and an empty
   libtorch.so replaces the real one, which would load libtorch_cuda.so. With one, CUDA's libraries
   and the headers that NCCL's half of c10d needs are fetched too (2.5 GB, 3.7 GB on disk), into a
   folder of their own. RECTIFLOW_LIBTORCH=cpu or =cuda overrides the choice: a GPU is not needed
   to build for one.

Standard output is the folder alone; progress and errors go to standard error. A second call costs
one stat. The SHA-256 of each wheel is checked before any of its files are used.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from wheels import PYTHON_TAG, cache_folder, download, fail, once, say

# tch 0.26 binds exactly this torch.
TORCH = "2.13.0"

# Package, version, SHA-256 of the wheel. The CUDA versions are those that torch 2.13.0 asks for,
# directly and through cuda-toolkit 13.0.3.
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
CUDA_WHEELS = [
    *CPU_WHEELS,
    (
        "nvidia-cublas",
        "13.1.1.3",
        "37936a16db8fe4ac1f065c2139360608a543a09275cb1a1af612e08cfa065436",
    ),
    (
        "nvidia-cuda-nvrtc",
        "13.0.88",
        "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575",
    ),
    (
        "nvidia-cudnn-cu13",
        "9.20.0.48",
        "0c45dd8eeb50b603f07995b1b300c62ffe6a1980482b82b3bcf94a4ca9d49304",
    ),
    (
        "nvidia-cufft",
        "12.0.0.61",
        "6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3",
    ),
    (
        "nvidia-cufile",
        "1.15.1.6",
        "08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44",
    ),
    (
        "nvidia-curand",
        "10.4.0.35",
        "1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc",
    ),
    (
        "nvidia-cusolver",
        "12.0.4.66",
        "0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112",
    ),
    (
        "nvidia-cusparse",
        "12.6.3.3",
        "2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b",
    ),
    (
        "nvidia-cusparselt-cu13",
        "0.8.1",
        "786ce87568c303fadb5afcc7102d454cd3040d75f6f8626f5db460d1871f4dd0",
    ),
    (
        "nvidia-nccl-cu13",
        "2.29.7",
        "edd81538446786ec3b73972543e53bb43bcaf0bfc8ef76cb679fcc390ffe136d",
    ),
    (
        "nvidia-nvjitlink",
        "13.0.88",
        "13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b",
    ),
    (
        "nvidia-nvshmem-cu13",
        "3.4.5",
        "290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80",
    ),
    ("nvidia-nvtx", "13.0.85", "4936d1d6780fbe68db454f5e72a42ff64d1fd6397df9f363ae786930fd5c1cd4"),
    # Headers alone, which those of c10d's NCCL half include.
    (
        "nvidia-cuda-crt",
        "13.0.88",
        "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4",
    ),
    (
        "nvidia-cuda-cccl",
        "13.0.85",
        "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649",
    ),
]
CPU_LIBRARIES = {
    "libtorch_cpu.so",
    "libc10.so",
    "libgomp.so.1",
    "libcudart.so.13",
    "libcupti.so.13",
}


def by_hand(wheels, folder):
    """The message for a failed download: how to provide libtorch without it."""
    wanted = " ".join(f"{name}=={version}" for name, version, _ in wheels)
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


def download_all(wheels, folder):
    """The checked wheels; downloads to `folder` those that are not there already."""
    advice = by_hand(wheels, folder)
    return [download(wheel, folder, "libtorch", advice) for wheel in wheels]


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
    wheels = download_all(CPU_WHEELS, folder)
    say(f"libtorch: unpacking the CPU part to {target}")
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unpack_cpu(wheels, unfinished)
    unfinished.rename(target)
    shutil.rmtree(folder)


def unpack_cuda(wheel, folder):
    """Writes libraries and headers of a wheel to `folder`, in pip's layout."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            path = Path(entry.filename)
            is_torch = path.parts[:2] in (("torch", "lib"), ("torch", "include"))
            if not entry.is_dir() and (is_torch or path.parts[0] == "nvidia"):
                archive.extract(entry, folder)


def install_cuda(cache, target):
    """torch with its CUDA libraries, in pip's layout so that its rpaths resolve."""
    say(f"libtorch: installing {TORCH} with CUDA to {target} (2.5 GB to fetch, 3.7 GB there)")
    wheels = download_all(CUDA_WHEELS, cache / "wheels")
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for wheel in wheels:
        say(f"libtorch: unpacking {wheel.name}")
        unpack_cuda(wheel, unfinished)
    unfinished.rename(target)
    shutil.rmtree(cache / "wheels")


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
