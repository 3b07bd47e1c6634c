#!/usr/bin/env python3
"""Plots the curves of scripts/mixing.sh, which calls this, and prints its numbers.

    python3 scripts/mixing_plot.py RUN PICTURE.png SEED...

RUN holds a run folder ORDER-SEED for each order and seed. Writes RUN/mixing.json too. Needs
matplotlib.
"""

import itertools
import json
import pathlib
import statistics
import sys

from matplotlib.figure import Figure

from curves import draw_range, events, scale_for_losses

ORDERS = {
    "local": ("local", "#1d6fb8"),
    "window": ("window, 512 samples", "#2f855a"),
    "bad": ("sorted rows, windows of 128", "#c2410c"),
}
SMOOTHED_STEPS = 15


def curves(folder, order, seeds, name, smoothed=1):
    """The sample counts, and for each seed the loss at each, averaged over `smoothed` steps."""
    samples, losses = [], []
    for seed in seeds:
        found = events(folder / f"{order}-{seed}", name)
        samples = [event["samples"] for event in found]
        raw = [float(event["loss"]) for event in found]
        losses.append(
            [statistics.mean(raw[max(0, at - smoothed + 1) : at + 1]) for at in range(len(raw))]
        )
    return samples, losses


def draw(axes, of_orders, title):
    """One panel; `of_orders` has the samples and losses of each order."""
    for order, (samples, losses) in of_orders.items():
        label, colour = ORDERS[order]
        draw_range(axes, samples, losses, colour, label)
    scale_for_losses(axes, [0.3, 0.4, 0.6, 0.8, 1.0])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("samples")
    axes.grid(color="#dfe4ea")


def plot(folder, picture, seeds):
    figure = Figure(figsize=(9, 3.6), dpi=110)
    left, right = figure.subplots(1, 2)
    training = {order: curves(folder, order, seeds, "step", SMOOTHED_STEPS) for order in ORDERS}
    draw(left, training, f"training loss, mean of {SMOOTHED_STEPS} steps")
    tests = {order: curves(folder, order, seeds, "test") for order in ORDERS}
    draw(right, tests, "loss on held-out pictures")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    folder, picture, *seeds = sys.argv[1:]
    folder = pathlib.Path(folder)
    plot(folder, picture, seeds)
    numbers = {}
    for order in ORDERS:
        _, tests = curves(folder, order, seeds, "test")
        _, steps = curves(folder, order, seeds, "step")
        spread = [statistics.stdev(b - a for a, b in itertools.pairwise(raw)) for raw in steps]
        ends = [losses[-1] for losses in tests]
        numbers[order] = {"test_loss": ends, "step_to_step": spread}
        mean, lowest, highest = statistics.mean(ends), min(ends), max(ends)
        print(f"{order:7} test loss {mean:.4f}, from {lowest:.4f} to {highest:.4f}")
    (folder / "mixing.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
