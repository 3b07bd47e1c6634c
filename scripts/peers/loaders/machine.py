"""What the numbers of a comparison were measured on."""

import pathlib
import platform


def processor():
    """The processor's name, with family and model: a host may name all its processors alike."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(pairs)}
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
