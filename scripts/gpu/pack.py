#!/usr/bin/env python3
"""Fills a folder with all that a machine with a GPU needs: `make gpu`.

    python3 scripts/gpu/pack.py target/cuda/release target/gpu

The programs, stripped; scripts/gpu; the tiny model and the demo's recipe; the configuration of
SDXL's UNet; and built.json, which says which libtorch they were linked with. On the other machine:
`scripts/gpu/run` in the folder.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ["rectiflow", "examples/random_sdxl"]
FILES = [
    "scripts/gpu",
    "assets/tiny-sdxl",
    "recipes/demo.toml",
    "crates/rectiflow-sdxl/configs/unet",
]


def libtorch(program):
    """The folder of the libtorch that a program was linked with, and its version."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    found = re.search(r"libtorch_cpu\.so => (\S+)", listed)
    if not found:
        sys.exit(f"pack: `ldd {program}` names no libtorch_cpu.so: build it first")
    folder = pathlib.Path(found[1]).resolve().parents[1]
    for name in ["version.py", "build-version"]:
        if (folder / name).exists():
            text = (folder / name).read_text().strip()
            stated = re.search(r"__version__ = ['\"]([^'\"]+)", text)
            return stated[1] if stated else text
    return folder.name


def commit():
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    built, out = map(pathlib.Path, sys.argv[1:])
    shutil.rmtree(out, ignore_errors=True)
    (out / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        if not (built / name).exists():
            sys.exit(f"pack: {built / name} is missing: `make gpu` builds it")
        target = out / "bin" / pathlib.Path(name).name
        shutil.copy2(built / name, target)
        subprocess.run(["strip", target], check=True)
    for name in FILES:
        source, target = ROOT / name, out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    about = {"torch": libtorch(built / "rectiflow"), "commit": commit()}
    (out / "built.json").write_text(json.dumps(about) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.0f} MB, linked with torch {about['torch']}")


if __name__ == "__main__":
    main()
