#!/usr/bin/env python3
"""Plots the results of scripts/experiments.sh, which calls this where Python has matplotlib.

    python3 scripts/experiments_plot.py RUN PICTURE.png SEED...

RUN holds measures.json, a run folder NAME-SEED for each experiment and seed, and
aligned-timesteps-SEED.txt.
"""

import json
import pathlib
import statistics
import sys

from matplotlib.figure import Figure

from curves import draw_range, events, scale_for_losses

COLOURS = {
    "frozen": "#1d6fb8",
    "trained": "#2f855a",
    "eps": "#c2410c",
    "base": "#64748b",
    "native": "#1d6fb8",
    "aligned": "#7c3aed",
}


def test_losses(run):
    return [(test["samples"], float(test["loss"])) for test in events(run, "test")]


def timesteps(file, mode):
    """The (step, test loss) pairs that `aligned_timesteps` printed for this mode."""
    rows = (line.split(", ") for line in file.read_text().splitlines()[1:])
    return [(int(row[1]), float(row[2])) for row in rows if row[0] == mode]


def draw_curves(axes, name, of_seeds):
    x = [x for x, _ in of_seeds[0]]
    losses = [[y for _, y in curve] for curve in of_seeds]
    draw_range(axes, x, losses, COLOURS[name], name, marker=".")


def draw_points(axes, measures, key, title):
    """One point per seed for each experiment."""
    names = ["base", "frozen", "trained", "eps"]
    for at, name in enumerate(names):
        of_name = [measure for measure in measures if measure["label"].split(",")[0] == name]
        means = [statistics.mean(measure[key]) for measure in of_name]
        axes.scatter([at] * len(means), means, color=COLOURS[name])
    axes.set_xticks(range(len(names)), names)
    axes.set_title(title, fontsize=10)


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    folder, picture, *seeds = sys.argv[1:]
    folder = pathlib.Path(folder)
    measures = json.loads((folder / "measures.json").read_text())
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)

    # The two panels with curves.
    for mode in ["native", "aligned"]:
        of_seeds = [timesteps(folder / f"aligned-timesteps-{seed}.txt", mode) for seed in seeds]
        draw_curves(axes[0], mode, of_seeds)
    axes[0].set_title("An eps model learns flow: timesteps", fontsize=10)
    axes[0].set_xlabel("steps")
    axes[0].set_ylabel("test loss")
    for name in ["frozen", "trained"]:
        draw_curves(axes[1], name, [test_losses(folder / f"{name}-{seed}") for seed in seeds])
    axes[1].set_title("Text encoders", fontsize=10)
    axes[1].set_xlabel("samples")

    # The two with one number per run.
    draw_points(axes[2], measures, "distance", "Feature distance to real pictures")
    draw_points(axes[3], measures, "border_on_black", "Brightness of a border that should be black")

    for panel in axes:
        panel.grid(color="#dfe4ea")
        panel.set_axisbelow(True)
    for panel in axes[:2]:
        scale_for_losses(panel, [0.4, 0.6, 0.8, 1.0])
        panel.legend(frameon=False, fontsize=9)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
