"""What the plots of several runs share: their events, a curve with its range over seeds, and an axis for losses."""

import json
import statistics

import matplotlib.ticker


def events(run, name):
    """The events of a run folder that have this name."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def draw_range(axes, x, of_seeds, colour, label, **line):
    """The mean of one list of numbers a seed, and their range. Some may be longer than others: small buckets give smaller
    micro-batches, and seeds differ by a step."""
    columns = list(zip(*of_seeds))
    x = x[: len(columns)]
    axes.plot(x, [statistics.mean(column) for column in columns], color=colour, label=label, **line)
    axes.fill_between(
        x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.2, linewidth=0
    )


def scale_for_losses(axes, ticks):
    axes.set_yscale("log")
    axes.set_yticks(ticks, minor=False)
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
