"""Times fp32 linear layers by oneDNN and by MKL, forward and both gradients, for SDXL's shapes.

    python scripts/peers/products.py

Prints GFLOP/s of oneDNN and of MKL for each shape (rows, inputs, outputs).
"""

import statistics
import time

import torch

SHAPES = [
    (2048, 192, 192),
    (2048, 192, 1536),
    (2048, 768, 192),
    (512, 320, 320),
    (512, 320, 2560),
    (512, 1280, 320),
    (154, 1024, 320),
    (2048, 640, 640),
    (2048, 640, 5120),
    (2048, 2560, 640),
    (2048, 1280, 1280),
    (512, 1280, 10240),
    (512, 5120, 1280),
    (154, 2048, 1280),
    (4096, 1280, 1280),
]
REPEATS = 9


def median_secs(function):
    function()
    function()
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def measure(rows, inputs, outputs):
    """GFLOP/s of oneDNN and of MKL: result, gradient of the input, gradient of the weight."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias, gradient = torch.randn(outputs), torch.randn(rows, outputs)
    billions = 2 * rows * inputs * outputs / 1e9
    pairs = {
        "y": (lambda: onednn(x, weight, bias), lambda: torch.addmm(bias, x, weight.t())),
        "dx": (lambda: onednn(gradient, weight.t()), lambda: gradient.mm(weight)),
        "dw": (lambda: onednn(gradient.t(), x.t()), lambda: gradient.t().mm(x)),
    }
    return {
        name: [billions / median_secs(function) for function in functions]
        for name, functions in pairs.items()
    }


def main():
    for shape in SHAPES:
        found = measure(*shape)
        words = [f"{name} {first:.0f} {second:.0f}" for name, (first, second) in found.items()]
        print(f"{shape}: {', '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
