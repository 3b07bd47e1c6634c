#!/usr/bin/env python3
"""Prints reference values of torch.optim.AdamW for the optimiser's golden test.

    python3 scripts/golden/adamw.py > crates/rectiflow-train/tests/golden/adamw.json

Made with torch 2.13.0.
"""

import json
import sys

import torch


def as_lists(tensors):
    return [tensor.double().tolist() for tensor in tensors]


def case(weight_decay, rate, updates=12, size=7):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(size, generator=generator)
    # Magnitudes from 1e-6 to 1, so that eps and both bias corrections matter.
    scale = torch.logspace(-6, 0, size)
    gradients = [torch.randn(size, generator=generator) * scale for _ in range(updates)]
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
    )
    after = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        after.append(parameter.detach().clone())
    return {
        "weight_decay": weight_decay,
        "rate": rate,
        "start": values.double().tolist(),
        "gradients": as_lists(gradients),
        "values": as_lists(after),
    }


def main():
    if not torch.__version__.startswith("2.13.0"):
        sys.exit(f"expected torch 2.13.0, found {torch.__version__}")
    json.dump([case(0.1, 1e-3), case(0.0, 1e-2)], sys.stdout)


if __name__ == "__main__":
    main()
