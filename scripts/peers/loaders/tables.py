"""The tables of compare.py: what each engine delivered, in Markdown."""

import statistics

NAMES = {
    "rectiflow": "rectiflow",
    "mosaic": "MosaicML Streaming",
    "litdata": "LitData",
    "webdataset": "WebDataset",
    "flowrider": "flowrider",
}
TRAIN_HEADS = [
    "engine",
    "samples/s",
    "per CPU second",
    "samples per request",
    "fetched / needed",
    "first batch",
    "memory",
    "disk",
    "samples delivered",
]
TEST_HEADS = ["engine", "samples delivered", "seconds", "requests", "message"]


def markdown(heads, rows):
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "".join(line + "\n" for line in lines)


def median(runs, value, form):
    """Over the runs without an error, or over all if every run has one; "-" without a number."""
    found = [value(run) for run in [run for run in runs if not run["error"]] or runs]
    found = [number for number in found if number is not None]
    return form.format(statistics.median(found)) if found else "-"


def samples_per_sec(run):
    return run.get("samples_per_sec")


def first_batch_secs(run):
    return run.get("first_batch_secs")


def samples_per_cpu_sec(run):
    return run["samples"] / max(run["cpu_secs"], 0.01)


def samples_per_request(run):
    return run["samples"] / max(run["requests"], 1)


def memory_gb(run):
    return run["memory_bytes"] / 1e9


def cache_gb(run):
    return run["cache_bytes"] / 1e9


class Tables:
    """The runs of compare.py, `samples` being the counts that write.py left."""

    def __init__(self, args, runs, samples):
        self.args, self.runs, self.samples = args, runs, samples

    def training_runs(self, engine, delay_ms, workers):
        key = ("train", engine, delay_ms, workers)
        return [
            run
            for run in self.runs
            if (run["part"], run["engine"], run["delay_ms"], run["workers"]) == key
        ]

    def amplification(self, run):
        """Bytes fetched over bytes needed."""
        if not run["samples"]:
            return None
        train = self.samples["train"]
        text_bytes = run["samples"] * train["text_bytes"] / train["samples"]
        needed = run["latent_bytes"] + text_bytes
        # rectiflow's loader goes on to the next pass, which requests the same bytes again.
        return run["distinct_bytes" if run["engine"] == "rectiflow" else "bytes"] / needed

    def training(self, delay_ms):
        rows = []
        for engine in self.args.engines:
            runs = self.training_runs(engine, delay_ms, self.args.workers)
            row = [
                NAMES[engine],
                median(runs, samples_per_sec, "{:,.0f}"),
                median(runs, samples_per_cpu_sec, "{:,.0f}"),
                median(runs, samples_per_request, "{:.1f}"),
                median(runs, self.amplification, "{:.3f}"),
                median(runs, first_batch_secs, "{:.2f} s"),
                median(runs, memory_gb, "{:.2f} GB"),
                median(runs, cache_gb, "{:.2f} GB"),
                ends(runs),
            ]
            rows.append(row)
        return markdown(TRAIN_HEADS, rows)

    def by_workers(self):
        counts = sorted({self.args.workers, *self.args.more_workers})
        rows = []
        for engine in self.args.engines:
            row = [NAMES[engine]]
            for workers in counts:
                runs = self.training_runs(engine, self.args.delays[-1], workers)
                row.append(median(runs, samples_per_sec, "{:,.0f}"))
            rows.append(row)
        return markdown(["engine", *map(str, counts)], rows)

    def test(self):
        rows = []
        for run in (run for run in self.runs if run["part"] == "test"):
            name = NAMES[run["engine"]] + (f", `{run['method']}`" if "method" in run else "")
            secs = f"{run['secs']:.1f}" if "secs" in run else "-"
            message = (run["error"] or "").replace("|", "\\|")
            rows.append(
                [name, f"{run.get('distinct', 0):,}", secs, f"{run['requests']:,}", message]
            )
        return markdown(TEST_HEADS, rows)

    def page(self, header):
        """All tables; `header` has the date and the machine."""
        args, train, test = self.args, self.samples["train"], self.samples["test"]
        machine = f"{header['date']}, {header['machine']}"
        parts = [f"{machine}; medians of {args.rounds} rounds, {args.workers} workers each.\n"]
        for delay_ms in args.delays:
            size = f"{train['samples']:,} samples in {train['buckets']} buckets"
            parts += [f"\n{size}, {delay_ms} ms per request:\n\n", self.training(delay_ms)]
        last_ms = args.delays[-1]
        parts += [f"\nSamples/s at {last_ms} ms by workers:\n\n", self.by_workers()]
        size = f"{test['samples']:,} samples in {test['buckets']} buckets"
        parts += [f"\nThe test set, {size}, {last_ms} ms per request:\n\n", self.test()]
        return "".join(parts)


def end(run):
    """How a pass ended: the samples delivered, and the error if there was one."""
    delivered = f"{run['distinct']:,}"
    if run["error"]:
        return f"{delivered}, then {run['error']}"
    return delivered if run["whole_pass"] else f"{delivered} when time was up"


def ends(runs):
    """How an engine's passes ended, with counts where they differ."""
    found = [end(run) for run in runs]
    counts = {text: found.count(text) for text in found}
    if len(counts) == 1:
        return found[0]
    return "; ".join(f"{text} ({count} of {len(runs)})" for text, count in counts.items())
