#!/usr/bin/env python3
"""Prints bitsandbytes' maps of 8 bits, and what its block-wise quantiser makes of numbers on a CPU.

    python3 scripts/golden/eight_bit.py > crates/rectiflow-train/tests/golden/eight_bit.json

Made with bitsandbytes 0.50.2 and torch 2.13.0. bitsandbytes imports without a GPU; where torch's
CUDA libraries are missing, scripts/peers/environment.py shows how to do without them.
"""

import json
import sys

import bitsandbytes
import torch
from bitsandbytes import functional

BLOCK = 256


def numbers(signed):
    """Two blocks and a part of one: sizes over eight decades, a block of equal scale, a spike."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(2 * BLOCK + 37, generator=generator)
    decades = torch.rand(BLOCK, generator=generator) * 8
    normal[:BLOCK] *= 10**-decades
    normal[-37:] = 1e-4
    normal[-20] = 1
    return normal if signed else normal.abs()


def case(signed):
    quantised = functional.create_dynamic_map(signed=signed)
    values = numbers(signed)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, quantised, BLOCK)
    return {
        "signed": signed,
        "block": BLOCK,
        "map": quantised.double().tolist(),
        "numbers": values.double().tolist(),
        "codes": codes.tolist(),
        "scales": absmax.double().tolist(),
    }


def main():
    found = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__.split('+')[0]}"
    if found != "bitsandbytes 0.50.2, torch 2.13.0":
        sys.exit(f"expected bitsandbytes 0.50.2, torch 2.13.0, found {found}")
    json.dump([case(True), case(False)], sys.stdout)


if __name__ == "__main__":
    main()
