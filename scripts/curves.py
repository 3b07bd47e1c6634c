"""Shared by the plots of several runs: their events, a curve with its range, an axis for losses."""

import json
import statistics

import matplotlib.ticker


def events(run, name):
    """The events of a run folder that have this name."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def draw_range(axes, x, of_seeds, colour, label, **line):
    """Draws the mean over seeds and the range between them; `of_seeds` has one list per seed.

    The lists may differ in length by a step, since small buckets yield smaller micro-batches: all
    are cut to the shortest.
    """
    columns = list(zip(*of_seeds, strict=False))
    x = x[: len(columns)]
    means = [statistics.mean(column) for column in columns]
    lowest, highest = list(map(min, columns)), list(map(max, columns))
    axes.plot(x, means, color=colour, label=label, **line)
    axes.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)


def scale_for_losses(axes, ticks):
    """A logarithmic axis with these ticks and no others."""
    axes.set_yscale("log")
    axes.set_yticks(ticks, minor=False)
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
