#!/usr/bin/env python3
"""Compares ways to keep AdamW's moments in 8 bits, on gradients without a model; needs numpy.

    python3 scripts/eight_bit_maps.py

Each way stores both moments after each update and reads them before the next one. Printed beside
exact moments: how far ten updates move small gradients beside one of 1 in 64 (in learning rates;
exactly 10 is right), the error of the updates for gradients of several spreads of size, and the
size of the updates of gradients that have become 30 times smaller 2,000 updates ago. docs/log.md
has the results.
"""

import functools

import numpy

BETAS = (0.9, 0.999)
EPS = 1e-12
SIZE = 256 * 16


@functools.cache
def draws():
    """The generator of all random rounding."""
    return numpy.random.default_rng(0)


@functools.cache
def dynamic_map(signed):
    """bitsandbytes' dynamic map of 8 bits."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        boundaries = numpy.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2 * 10.0 ** (decade - 6)
        numbers += [*means, *(-means if signed else [])]
    return numpy.sort(numpy.array(numbers))


def by_map(numbers, numbers_of_map, block, at_random=False, floor=False):
    """Numbers after a block's scale and a map have rounded them."""
    rows = numbers.reshape(-1, block)
    scale = numpy.abs(rows).max(1, keepdims=True)
    ratios = rows / numpy.where(scale == 0, 1, scale)
    upper = numpy.clip(numpy.searchsorted(numbers_of_map, ratios), 1, 255)
    lower = upper - 1
    width = numbers_of_map[upper] - numbers_of_map[lower]
    part = (ratios - numbers_of_map[lower]) / width
    chance = draws().random(ratios.shape) if at_random else 0.5
    code = numpy.where(part > chance, upper, lower)
    if floor:
        code = numpy.where((ratios > 0) & (code == 0), 1, code)
    return (numbers_of_map[code] * scale).reshape(-1)


def by_root(squares, block, at_random):
    return by_map(numpy.sqrt(squares), dynamic_map(False), block, at_random, floor=True) ** 2


def as_floats(numbers, signed):
    """8-bit floats of 3 bits of mantissa below a power of two for 64 numbers, rounded at random."""
    rows = numbers.reshape(-1, 64)
    largest = numpy.maximum(numpy.abs(rows).max(1, keepdims=True), 1e-38)
    scale = 2.0 ** numpy.floor(numpy.log2(largest))
    ratios = (numpy.abs(rows) / scale).astype(numpy.float32)
    bits = ratios.view(numpy.int32).astype(numpy.int64)
    top = 128 << 3  # 2, which rounding may reach
    code = numpy.minimum((bits + draws().integers(0, 1 << 20, rows.shape)) >> 20, top)
    lowest = top - (126 if signed else 254)
    found = (code << 20).astype(numpy.int32).view(numpy.float32)
    least = numpy.array([lowest << 20], dtype=numpy.int32).view(numpy.float32)[0]
    rest = numpy.abs(rows) / scale / least
    below = numpy.where(draws().random(rows.shape) < rest, least, 0) if signed else least
    found = numpy.where(code < lowest, numpy.where(rows == 0, 0, below), found)
    return (numpy.sign(rows) * found * scale).reshape(-1)


def factored(squares):
    """The outer product of the means of rows and columns, Adafactor's second moment."""
    matrix = squares.reshape(64, -1)
    rows, columns = matrix.mean(1, keepdims=True), matrix.mean(0, keepdims=True)
    return (rows * columns / max(matrix.mean(), 1e-300)).reshape(-1)


def exact(numbers):
    return numbers


def nearest(block):
    """The first moment as bitsandbytes stores it."""
    return lambda mean: by_map(mean, dynamic_map(True), block)


def ways():
    """How each way stores the first moment and the second, by its name."""
    return {
        "bitsandbytes, blocks of 256": (nearest(256), lambda v: by_map(v, dynamic_map(False), 256)),
        "the same, blocks of 64": (nearest(64), lambda v: by_map(v, dynamic_map(False), 64)),
        "the same, 64, with a floor": (
            nearest(64),
            lambda v: by_map(v, dynamic_map(False), 64, floor=True),
        ),
        "root, nearest, 64": (nearest(64), lambda v: by_root(v, 64, False)),
        "root and mean at random, 64": (
            lambda m: by_map(m, dynamic_map(True), 64, True),
            lambda v: by_root(v, 64, True),
        ),
        "root at random, 64 (taken)": (nearest(64), lambda v: by_root(v, 64, True)),
        "root at random, 256": (nearest(256), lambda v: by_root(v, 256, True)),
        "8-bit floats at random, 64": (
            lambda m: as_floats(m, True),
            lambda v: as_floats(v, False),
        ),
        "factored second moment": (nearest(64), factored),
    }


def updates(gradient, count, way, kept=100):
    """The last updates of `count`, in learning rates, and the sum of all."""
    mean, square = numpy.zeros(SIZE), numpy.zeros(SIZE)
    moved, last = numpy.zeros(SIZE), []
    for number in range(1, count + 1):
        g = gradient(number)
        mean += (1 - BETAS[0]) * (g - mean)
        square = BETAS[1] * square + (1 - BETAS[1]) * g * g
        corrections = [1 - beta**number for beta in BETAS]
        update = mean / corrections[0] / (numpy.sqrt(square / corrections[1]) + EPS)
        moved += update
        last.append(update)
        del last[:-kept]
        mean, square = way[0](mean), way[1](square)
    return moved, numpy.array(last)


def beside_a_spike(way, ratio):
    gradient = numpy.full(SIZE, ratio)
    gradient[draws().permutation(64) + 64 * numpy.arange(64)] = 1
    moved, _ = updates(lambda _: gradient, 10, way)
    small = moved[gradient < 1]
    return f"{small.mean():.1f} [{small.min():.1f}, {small.max():.1f}]"


def spread(deviation, small_from=None):
    def make():
        random = numpy.random.default_rng(7)
        sizes = numpy.exp(deviation * random.standard_normal(SIZE))

        def gradient(number):
            found = sizes * (random.standard_normal(SIZE) + 0.1)
            if small_from is not None and number > small_from:
                found[::2] /= 30
            return found

        return gradient

    return make


def main():
    for name, way in ways().items():
        print(name)
        ratios = (1e-2, 1e-3, 1e-4, 1e-5)
        spikes = [f"{ratio:g}: {beside_a_spike(way, ratio)}" for ratio in ratios]
        print("   moved beside 1:", ", ".join(spikes))
        errors = []
        for deviation in (0, 1.5, 3):
            _, wanted = updates(spread(deviation)(), 800, (exact, exact))
            _, found = updates(spread(deviation)(), 800, way)
            errors.append(numpy.linalg.norm(found - wanted) / numpy.linalg.norm(wanted))
        print("   error of updates:", ", ".join(f"{error:.3g}" for error in errors))
        falling = spread(0, small_from=300)
        _, wanted = updates(falling(), 2300, (exact, exact))
        _, found = updates(falling(), 2300, way)
        ratio = numpy.linalg.norm(found[:, ::2]) / numpy.linalg.norm(wanted[:, ::2])
        print(f"   after falling by 30: {ratio:.2f} of the updates' size")


if __name__ == "__main__":
    main()
