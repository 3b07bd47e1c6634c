#!/usr/bin/env python3
"""The picture of docs/guard.md: false alarms against delay, and how soon faults are found.

    python3 scripts/guard_plot.py BEFORE.csv AFTER.csv PICTURE.png

Both files are printed by `examples/guard_curves.rs`: BEFORE for the guard with six deviations (its
other rows are called "deviations N"), AFTER for the present one. Needs matplotlib.
"""

import collections
import csv
import sys

import matplotlib.pyplot as plot

FAULTS = {
    "norm from here on x3": ("norm x3", "#64748b"),
    "norm from here on x10": ("norm x10", "#2f855a"),
    "norm from here on x30": ("norm x30", "#1d6fb8"),
    "from here on x3": ("loss and norm x3", "#7c3aed"),
    "1% a step": ("both grow by 1% a step", "#c2410c"),
}
AGAINST = "one norm x30"
SEEN_NONE = 0.02


def read(path):
    """By guard and fault: {delay: share}; of clean traces {what: number}."""
    found = collections.defaultdict(dict)
    with open(path) as lines:
        for row in csv.DictReader(lines):
            delay = row["delay"]
            found[row["guard"], row["fault"]][int(delay) if delay.isdigit() else delay] = float(
                row["share"]
            )
    return found


def tradeoff(axes, rows, label, colour):
    """False alarms per 100,000 updates and the share of missed single spikes, by setting."""
    points = []
    for guard, fault in rows:
        if fault == "clean HeldOut" and guard != "warmup 10":
            alarms = max(rows[guard, fault]["per 100000"], SEEN_NONE)
            points.append((alarms, 1 - rows[guard, AGAINST][0], guard))
    points.sort(key=lambda point: point[1])
    axes.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        "-o",
        color=colour,
        label=label,
        markersize=4,
    )
    for x, y, guard in points:
        if guard == "defaults":
            axes.plot(x, y, "o", color=colour, markersize=11, fillstyle="none")
        name = {"defaults": "in force"}.get(
            guard, guard.replace("deviations ", "").replace("chance ", "")
        )
        offset = (5, 5) if label.startswith("now") else (-4, -12)
        axes.annotate(
            name, (x, y), fontsize=7, xytext=offset, textcoords="offset points", color=colour
        )


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    before, after = read(sys.argv[1]), read(sys.argv[2])
    plot.switch_backend("Agg")
    figure, (left, right) = plot.subplots(1, 2, figsize=(10, 4), dpi=110)
    tradeoff(left, before, "before: number of deviations", "#64748b")
    tradeoff(left, after, "now: accepted chance", "#1d6fb8")
    left.axvline(1, color="#c2410c", linewidth=0.8, linestyle=":")
    left.set_xscale("log")
    left.set_xlabel(
        f"false alarms per 100,000 updates, held-out runs ({SEEN_NONE}: none seen)", fontsize=8
    )
    left.set_ylabel("share of single gradient norms x30 that are applied", fontsize=8)
    left.set_title("false alarms against what is missed", fontsize=10)
    for fault, (label, colour) in FAULTS.items():
        for rows, style in ((before, "--"), (after, "-")):
            curve = rows["defaults", fault]
            right.plot([delay + 1 for delay in curve], list(curve.values()), style, color=colour)
        right.plot([], [], "-", color=colour, label=label)
    right.plot([], [], "--", color="black", label="before")
    right.set_xscale("log")
    right.set_xlabel("updates until the guard acts", fontsize=8)
    right.set_ylabel("share of traces", fontsize=8)
    right.set_title("faults that stay", fontsize=10)
    right.set_ylim(-0.3, 1.05)
    left.legend(frameon=False, fontsize=7)
    right.legend(frameon=False, fontsize=7, ncols=2, loc="lower left")
    for axes in (left, right):
        axes.grid(color="#dfe4ea")
    figure.tight_layout()
    figure.savefig(sys.argv[3])


if __name__ == "__main__":
    main()
