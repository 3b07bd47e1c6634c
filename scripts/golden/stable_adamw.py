#!/usr/bin/env python3
"""Numbers of StableAdamW for the optimiser's golden test, from the algorithm as its paper prints it.

Wortsman et al., "Stable and low-precision training for large-scale vision-language models", arXiv 2304.13013, algorithm
2 (StableAdamW: AdamW with AdaFactor's update clipping), in plain Python floats, one tensor at a time:

    beta^ = beta * (1 - beta^(t-1)) / (1 - beta^t)           both betas; this is bias correction
    m = beta1^ m + (1 - beta1^) g
    v = beta2^ v + (1 - beta2^) g^2
    RMS = sqrt(mean(g^2 / max(v, eps^2)))
    eta = rate / max(1, RMS)
    w = w - eta * decay * w - eta * m / (sqrt(v) + eps)

Run: python3 scripts/golden/stable_adamw.py > crates/rectiflow-train/tests/golden/stable_adamw.json
"""

import json
import math
import random
import struct
import sys

TENSORS = [(0, 3), (3, 8)]  # the vector in two tensors


def fp32(value):
    """Inputs are what the program sees: rounded to single precision."""
    return struct.unpack("f", struct.pack("f", value))[0]


def update(t, w, m, v, g, rate, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    beta1 = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
    beta2 = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
    m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g)]
    v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g)]
    rms = math.sqrt(sum(b * b / max(a, eps * eps) for a, b in zip(v, g)) / len(g))
    eta = rate / max(1.0, rms)
    w = [a - eta * decay * a - eta * b / (math.sqrt(c) + eps) for a, b, c in zip(w, m, v)]
    return w, m, v


def case(decay, rate, updates=12, size=8):
    draw = random.Random(3)
    w = [fp32(draw.gauss(0, 1)) for _ in range(size)]
    m, v = [0.0] * size, [0.0] * size
    start, gradients, values = list(w), [], []
    for t in range(1, updates + 1):
        g = [draw.gauss(0, 1) * 10 ** (i - size + 1) for i in range(size)]
        if t > updates // 2:
            first, last = TENSORS[1]
            g = [100 * b if first <= i < last else b for i, b in enumerate(g)]
        g = [fp32(b) for b in g]
        for first, last in TENSORS:
            part = slice(first, last)
            w[part], m[part], v[part] = update(t, w[part], m[part], v[part], g[part], rate, decay)
        gradients.append(g)
        values.append(list(w))
    return {
        "weight_decay": decay,
        "rate": rate,
        "start": start,
        "gradients": gradients,
        "values": values,
    }


json.dump([case(0.1, 1e-3), case(0.0, 1e-2)], sys.stdout)
