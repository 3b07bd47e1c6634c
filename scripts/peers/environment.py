#!/usr/bin/env python3
"""Makes a Python environment for the comparisons: pinned PyTorch and the peers, for the CPU.

    python3 scripts/peers/environment.py FOLDER [REQUIREMENTS]

Creates or completes a virtual environment at FOLDER with REQUIREMENTS, by default
scripts/peers/requirements.txt. The registry's torch wheel is built for CUDA and depends on 4 GB of
CUDA libraries, which no comparison uses. It is installed without them (1.2 GB in all): the two
small ones that torch calls while loading are installed, and empty shared objects replace the
others. Python must then resolve symbols when they are called instead of at once, which
TORCH_USE_RTLD_GLOBAL=1 enables; the scripts that compare set it. To compare on an NVIDIA GPU,
install scripts/golden/requirements.txt unchanged instead.
"""

import pathlib
import re
import subprocess
import sys

REQUIREMENTS = pathlib.Path(__file__).parent / "requirements.txt"


def needed(library):
    """The names of the shared objects that a library requires."""
    command = ["readelf", "-d", library]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", answer)


def replace_missing(environment):
    """Makes empty shared objects for the CUDA libraries that torch requires and are missing."""
    packages = next(environment.glob("lib/python*/site-packages"))
    folder = packages / "torch/lib"
    present = {path.name for path in [*folder.glob("*.so*"), *packages.glob("nvidia/*/lib/*.so*")]}
    cuda = re.compile(r"lib(cu|nv|nccl)")
    required = {name for library in folder.glob("lib*.so*") for name in needed(library)}
    for name in sorted(required - present):
        if cuda.match(name):
            command = ["cc", "-shared", f"-Wl,-soname,{name}", "-x", "c", "/dev/null"]
            subprocess.run([*command, "-o", str(folder / name)], check=True)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    environment = pathlib.Path(sys.argv[1])
    requirements = sys.argv[2] if len(sys.argv) == 3 else REQUIREMENTS
    python = environment / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--no-deps", "-r", requirements], check=True)
    replace_missing(environment)


if __name__ == "__main__":
    main()
