#!/usr/bin/env python3
"""The curves and numbers of scripts/mixing.sh, which calls this.

    python3 scripts/mixing_plot.py RUN PICTURE.png SEED...

RUN has a run folder ORDER-SEED for each order and seed. Writes RUN/mixing.json too. Needs matplotlib.
"""

import json
import pathlib
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plot

from curves import draw_range, events, scale_for_losses

ORDERS = {
    "local": ("local", "#1d6fb8"),
    "window": ("window, 512 samples", "#2f855a"),
    "bad": ("sorted rows, windows of 128", "#c2410c"),
}
SMOOTHED_STEPS = 15


def curves(folder, order, seeds, name, smoothed=1):
    """Samples, and for each seed the loss there, averaged over so many steps."""
    samples, losses = [], []
    for seed in seeds:
        found = events(folder / f"{order}-{seed}", name)
        samples = [event["samples"] for event in found]
        raw = [float(event["loss"]) for event in found]
        losses.append(
            [statistics.mean(raw[max(0, at - smoothed + 1) : at + 1]) for at in range(len(raw))]
        )
    return samples, losses


def draw(axes, folder, seeds, name, smoothed, title):
    for order, (label, colour) in ORDERS.items():
        samples, losses = curves(folder, order, seeds, name, smoothed)
        draw_range(axes, samples, losses, colour, label)
    scale_for_losses(axes, [0.3, 0.4, 0.6, 0.8, 1.0])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("samples")
    axes.grid(color="#dfe4ea")


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    folder, picture, *seeds = sys.argv[1:]
    folder = pathlib.Path(folder)
    figure, (left, right) = plot.subplots(1, 2, figsize=(9, 3.6), dpi=110)
    draw(
        left,
        folder,
        seeds,
        "step",
        SMOOTHED_STEPS,
        f"training loss, mean of {SMOOTHED_STEPS} steps",
    )
    draw(right, folder, seeds, "test", 1, "loss on held-out pictures")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)
    numbers = {}
    for order in ORDERS:
        _, tests = curves(folder, order, seeds, "test")
        _, steps = curves(folder, order, seeds, "step")
        spread = [statistics.stdev(b - a for a, b in zip(raw, raw[1:])) for raw in steps]
        numbers[order] = {"test_loss": [losses[-1] for losses in tests], "step_to_step": spread}
        ends = numbers[order]["test_loss"]
        print(
            f"{order:7} test loss {statistics.mean(ends):.4f}, from {min(ends):.4f} to {max(ends):.4f}"
        )
    (folder / "mixing.json").write_text(json.dumps(numbers, indent=1) + "\n")


main()
