#!/usr/bin/env python3
"""Make a Python environment that the comparisons run in: pinned PyTorch and what is compared, for the CPU.

    python3 scripts/peers/environment.py FOLDER [REQUIREMENTS]

Makes a virtual environment at FOLDER, or completes the one there, with scripts/peers/requirements.txt or with the file
that is named. The torch wheel of the registry is built for CUDA and asks for 4 GB of CUDA libraries, which no
comparison uses. So it is installed without them (1.2 GB in all): the two small ones that it calls while it is loaded
are installed, and empty shared objects stand in for the others. Python must then resolve symbols when they are called
and not at once, which TORCH_USE_RTLD_GLOBAL=1 tells it; the scripts that compare set it. Where an NVIDIA GPU is to be
compared, install scripts/golden/requirements.txt as it is instead.
"""

import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"


def needed(library):
    """The names of the shared objects that a library asks for."""
    answer = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", answer)


def stand_in(environment):
    """Empty shared objects for what torch's libraries ask for and the environment lacks."""
    packages = next(environment.glob("lib/python*/site-packages"))
    folder = packages / "torch/lib"
    there = {path.name for path in [*folder.glob("*.so*"), *packages.glob("nvidia/*/lib/*.so*")]}
    cuda = re.compile(r"lib(cu|nv|nccl)")
    asked = {
        name for library in folder.glob("lib*.so*") for name in needed(library) if cuda.match(name)
    }
    for name in sorted(asked - there):
        command = [
            "cc",
            "-shared",
            f"-Wl,-soname,{name}",
            "-x",
            "c",
            "/dev/null",
            "-o",
            str(folder / name),
        ]
        subprocess.run(command, check=True)


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
    stand_in(environment)


main()
