#!/usr/bin/env python3
"""Prints the path of the ONNX Runtime that `rectiflow tag` and `rectiflow score` load; fetches it
if missing.

`make test` calls this; the program itself compiles without it. The first of these that applies is
used:

1. ORT_DYLIB_PATH set by the user: unchanged.
2. The library of the pinned onnxruntime wheel for the CPU, fetched with pip into
   $XDG_CACHE_HOME/rectiflow (default ~/.cache/rectiflow), shared by all clones. The program looks
   there by itself.

For an NVIDIA GPU: `pip install onnxruntime-gpu[cuda,cudnn]`, build with `--features cuda`, and
name the file onnxruntime/capi/libonnxruntime.so.1.* of that package by ORT_DYLIB_PATH.

Standard output is the path alone; progress and errors go to standard error. A second call costs
one stat. The SHA-256 of the wheel is checked before any of its files are used.
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path

from wheels import PYTHON_TAG, cache_folder, download, fail, once, say

# crates/rectiflow-annotate/src/onnx/runtime.rs looks for this version, and ort 2.0.0-rc.15 loads
# 1.17 and later. Package, version, SHA-256 of the wheel.
VERSION = "1.31.1"
WHEEL = (
    "onnxruntime",
    VERSION,
    "1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536",
)
MEMBER = f"onnxruntime/capi/libonnxruntime.so.{VERSION}"
NOTICES = ["onnxruntime/LICENSE", "onnxruntime/ThirdPartyNotices.txt"]


def by_hand(folder):
    """The message for a failed download: how to provide the library without it."""
    return f"""could not fetch ONNX Runtime. Either
  - install onnxruntime {VERSION} yourself (`pip install onnxruntime=={VERSION}`) and name its file
    {MEMBER} by ORT_DYLIB_PATH,
  - or, on a machine with access, run
      python3 -m pip download --no-deps --only-binary=:all: --python-version {PYTHON_TAG} \\
          -d wheels onnxruntime=={VERSION}
    copy the wheel to {folder} and run make again."""


def install(target):
    folder = target.parent / "wheels-onnxruntime"
    wheel = download(WHEEL, folder, "ONNX Runtime", by_hand(folder))
    say(f"ONNX Runtime: unpacking to {target}")
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in [MEMBER, *NOTICES]:
            name = "libonnxruntime.so" if member == MEMBER else Path(member).name
            try:
                with archive.open(member) as source, open(unfinished / name, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 22)
            except KeyError:
                fail(f"{wheel.name} lacks {member}")
    unfinished.rename(target)
    shutil.rmtree(folder)


def main():
    if path := os.environ.get("ORT_DYLIB_PATH"):
        if not Path(path).is_file():
            fail(f"ORT_DYLIB_PATH={path}: expected the file libonnxruntime.so.1.*")
        return path
    if (sys.platform, os.uname().machine) != ("linux", "x86_64"):
        fail(f"no pinned ONNX Runtime for {sys.platform} {os.uname().machine}; set ORT_DYLIB_PATH")
    target = cache_folder() / f"onnxruntime-{VERSION}-cpu"
    once(target, lambda: install(target))
    return str(target / "libonnxruntime.so")


if __name__ == "__main__":
    print(main())
