#!/usr/bin/env python3
"""Tables and plots of scripts/captions_use.sh, which calls this.

    python3 scripts/captions_use_plot.py RUN PICTURE.png SEED...

RUN holds a run folder MODE-SEED for each mode and seed, and measured-KIND with what demo_measure
found and kept with prompts of that kind. Writes RUN/numbers.json and RUN/tables.md. Differences are
from the model of the same seed that was trained on short captions, with the standard error over the
seeds.
"""

import json
import math
import pathlib
import statistics
import sys

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from curves import draw_range, events, scale_for_losses

MODES = {"short": "#64748b", "phrases": "#1d6fb8", "long": "#c2410c"}
# Side of the grid on which colours are compared.
GRID = 4


def grid(image):
    """The mean colours of a picture's parts, 0 to 255."""
    return np.asarray(image.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX), np.float64)


def real_grids(folder, count):
    """Those of the real pictures whose captions were drawn, as demo_measure chooses them."""
    paths = sorted((folder / "real").glob("*.png"))
    total = len(paths)
    chosen = [at * total // count if count <= total else at % total for at in range(count)]
    return [grid(Image.open(paths[at])) for at in chosen]


def colour_distance(kept, real):
    """How far drawn pictures are from the real ones with the same captions, part by part."""
    drawn = [grid(Image.open(path)) for path in sorted(kept.glob("*.png"))]
    pairs = zip(drawn, real, strict=True)
    return statistics.mean(float(np.abs(a - b).mean()) for a, b in pairs)


def measured(folder, kind, mode, seed):
    """What was measured of a model with prompts of a kind."""
    run = folder / f"measured-{kind}"
    label = f"{mode}, seed {seed}"
    found = json.loads((run / "measures.json").read_text())
    numbers = next(entry for entry in found if entry["label"] == label)
    kept = run / "kept" / label / "seed-0"
    real = real_grids(run / "kept", len(list(kept.glob("*.png"))))
    return {
        "distance": numbers["distance"][0],
        "background_right": numbers["background_right"][0],
        "colour_distance": colour_distance(kept, real),
    }


def collected(folder, seeds):
    """All numbers by mode, a list with one entry for each seed."""
    numbers = {}
    for mode in MODES:
        ends = [events(folder / f"{mode}-{seed}", "test")[-1] for seed in seeds]
        of_mode = {
            "test_loss": [float(end["loss"]) for end in ends],
            "bins": [[bin_["loss"] for bin_ in end["bins"]] for end in ends],
        }
        for kind in dict.fromkeys([mode, "short"]):
            of_kind = [measured(folder, kind, mode, seed) for seed in seeds]
            for name in of_kind[0]:
                of_mode[f"{name}, {kind} prompts"] = [entry[name] for entry in of_kind]
        numbers[mode] = of_mode
    return numbers


def paired(values, base):
    """The mean difference with its standard error."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.4f}"


def loss_table(numbers):
    """The test loss at the end, whole and by noise level, and its differences from short."""
    short = numbers["short"]
    lines = ["| sigma | short | phrases less short | long less short |", "|---|---|---|---|"]

    def row(name, of_mode):
        base = of_mode("short")
        cells = [f"{statistics.mean(base):.4f}"]
        cells += [paired(of_mode(mode), base) for mode in ("phrases", "long")]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("all", lambda mode: numbers[mode]["test_loss"])
    count = len(short["bins"][0])
    for at in range(count):
        name = f"{at / count:.1f} to {(at + 1) / count:.1f}"
        row(name, lambda mode, at=at: [bins[at] for bins in numbers[mode]["bins"]])
    return "\n".join(lines) + "\n"


def drawing_table(numbers):
    heads = ["trained on", "prompts", "feature distance", "colours apart", "correct background"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    base = numbers["short"]
    for mode, kind in [(mode, kind) for kind in ("short", "own") for mode in MODES]:
        if mode == "short" and kind == "own":
            continue
        named = mode if kind == "own" else "short"
        cells = [mode, named]
        for name in ("distance", "colour_distance", "background_right"):
            values = numbers[mode][f"{name}, {named} prompts"]
            text = f"{statistics.mean(values):.3f}"
            if mode != "short":
                text += f" ({paired(values, base[f'{name}, short prompts'])})"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(folder, picture, seeds, numbers):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mode, colour in MODES.items():
        found = [events(folder / f"{mode}-{seed}", "test") for seed in seeds]
        samples = [event["samples"] for event in found[0]]
        losses = [[float(event["loss"]) for event in tests] for tests in found]
        draw_range(left, samples, losses, colour, mode)
    scale_for_losses(left, [0.4, 0.6, 0.8, 1.0])
    left.set_title("test loss", fontsize=10)
    left.set_xlabel("samples")
    left.legend(frameon=False, fontsize=9)
    for mode in ("phrases", "long"):
        pairs = zip(numbers[mode]["bins"], numbers["short"]["bins"], strict=True)
        differences = [np.subtract(a, b) for a, b in pairs]
        middles = (np.arange(len(differences[0])) + 0.5) / len(differences[0])
        draw_range(right, list(middles), differences, MODES[mode], mode, marker=".")
    right.axhline(0, color="#334155", linewidth=0.8)
    right.set_title("test loss less that of short captions", fontsize=10)
    right.set_xlabel("sigma")
    for panel in (left, right):
        panel.grid(color="#dfe4ea")
        panel.set_axisbelow(True)
    figure.savefig(picture, dpi=110)


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    folder, picture, *seeds = sys.argv[1:]
    folder = pathlib.Path(folder)
    numbers = collected(folder, seeds)
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    tables = loss_table(numbers) + "\n" + drawing_table(numbers)
    (folder / "tables.md").write_text(tables)
    print(tables)
    plot(folder, picture, seeds, numbers)


if __name__ == "__main__":
    main()
