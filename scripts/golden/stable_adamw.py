#!/usr/bin/env python3
"""Prints reference values of StableAdamW for the optimiser's golden test, by its paper's algorithm.

Wortsman et al., "Stable and low-precision training for large-scale vision-language models", arXiv
2304.13013, algorithm 2 (StableAdamW: AdamW with AdaFactor's update clipping), in plain Python
floats, one tensor at a time:

    beta^ = beta * (1 - beta^(t-1)) / (1 - beta^t)           both betas; this is bias correction
    m = beta1^ m + (1 - beta1^) g
    v = beta2^ v + (1 - beta2^) g^2
    RMS = sqrt(mean(g^2 / max(v, eps^2)))
    eta = rate / max(1, RMS)
    w = w - eta * decay * w - eta * m / (sqrt(v) + eps)

Usage:

    python3 scripts/golden/stable_adamw.py > crates/rectiflow-train/tests/golden/stable_adamw.json
"""

import json
import math
import random
import struct
import sys

# The vector consists of two tensors, each from a first element to behind a last one.
TENSORS = [(0, 3), (3, 8)]
BETAS = (0.9, 0.999)
EPS = 1e-8


def fp32(value):
    """Rounds to single precision, as the program's inputs are."""
    return struct.unpack("f", struct.pack("f", value))[0]


def corrected(beta, t):
    """The decay of a moment at update `t`, with bias correction."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def update(t, state, g, rate, decay):
    """The state (weights, first and second moments) after update `t` with gradient `g`."""
    w, m, v = state
    beta1, beta2 = (corrected(beta, t) for beta in BETAS)
    m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
    v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g, strict=True)]
    squares = (b * b / max(a, EPS * EPS) for a, b in zip(v, g, strict=True))
    rms = math.sqrt(sum(squares) / len(g))
    eta = rate / max(1.0, rms)
    w = [
        a - eta * decay * a - eta * b / (math.sqrt(c) + EPS)
        for a, b, c in zip(w, m, v, strict=True)
    ]
    return w, m, v


def case(decay, rate, updates=12, size=8):
    draw = random.Random(3)
    w = [fp32(draw.gauss(0, 1)) for _ in range(size)]
    m, v = [0.0] * size, [0.0] * size
    start, gradients, values = list(w), [], []
    for t in range(1, updates + 1):
        g = [draw.gauss(0, 1) * 10 ** (i - size + 1) for i in range(size)]
        # In the second half the gradient of the second tensor is 100 times as large.
        if t > updates // 2:
            first, last = TENSORS[1]
            g = [100 * b if first <= i < last else b for i, b in enumerate(g)]
        g = [fp32(b) for b in g]
        for first, last in TENSORS:
            part = slice(first, last)
            w[part], m[part], v[part] = update(t, (w[part], m[part], v[part]), g[part], rate, decay)
        gradients.append(g)
        values.append(list(w))
    return {
        "weight_decay": decay,
        "rate": rate,
        "start": start,
        "gradients": gradients,
        "values": values,
    }


def main():
    json.dump([case(0.1, 1e-3), case(0.0, 1e-2)], sys.stdout)


if __name__ == "__main__":
    main()
