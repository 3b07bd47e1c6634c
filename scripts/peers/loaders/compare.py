#!/usr/bin/env python3
"""Reads the same samples from the same server with rectiflow's loader and with four others, each in turn.

    python3 scripts/peers/loaders/compare.py FOLDER --python VENV/bin/python --program side_by_side --out RUNS
        [--rounds 2] [--delays 0 20] [--workers 4] [--more-workers 8] [--secs 30] [--engines ...] [--page FILE.md]

FOLDER (13 GB) gets the samples, packed by each engine in its own format, the engines' caches, and all that they say,
log.txt. Every run is a process of its own that begins with an empty cache and reads one pass in batches of 16 of one
shape. The server, an example program of rectiflow-data, answers each request later by the delay, and counts requests
and bytes. Its files are in the page cache. RUNS gets every number, runs.jsonl, and the tables, tables.md, which are
also put into the page, between its two marks. Engine by engine: engine_*.py; the samples: samples.py.
"""

import argparse
import datetime
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).parent
NAMES = {
    "rectiflow": "rectiflow",
    "mosaic": "MosaicML Streaming",
    "litdata": "LitData",
    "webdataset": "WebDataset",
    "flowrider": "flowrider",
}
# Around what the page has from here.
MARKS = ["<!-- scripts/peers/loaders/compare.py writes from here -->", "<!-- to here -->"]
# An engine that has not given a batch by then is ended.
PATIENCE_SECS = 180


class Server:
    """The object store; its counts are those since the delay was set."""

    def __init__(self, program, folder):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([program, "serve", folder], **pipes)
        self.url = self.process.stdout.readline().strip()

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def begin(self, delay_ms):
        self.tell(f"delay {delay_ms}")

    def served(self):
        self.tell("served")
        return json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


class Watch(threading.Thread):
    """Memory and processor time of all processes of a session, five times a second."""

    def __init__(self, session):
        super().__init__(daemon=True)
        self.session = session
        self.peak = {"memory_bytes": 0, "rss_bytes": 0, "processes": 0}
        self.ticks = {}
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(0.2):
            self.look()

    def look(self):
        now = {"memory_bytes": 0, "rss_bytes": 0, "processes": 0}
        for process in members(self.session):
            try:
                fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
                rollup = (process / "smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            kib = {line.split()[0][:-1]: int(line.split()[1]) for line in rollup[1:]}
            # Pages of files, libraries and caches on a disk, can be dropped; they count in rss_bytes alone.
            now["memory_bytes"] += 1024 * (kib["Pss_Anon"] + kib["Pss_Shmem"])
            now["rss_bytes"] += 1024 * kib["Rss"]
            now["processes"] += 1
            self.ticks[process.name] = int(fields[11]) + int(fields[12])
        self.peak = {key: max(value, now[key]) for key, value in self.peak.items()}

    def cpu_secs(self):
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")


def members(session):
    """The folders in /proc of the processes of a session."""
    found = []
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(process)
    return found


def into_page_cache(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def command_of(args, run, url, cache):
    if run["engine"] == "rectiflow":
        return [args.program, run["part"], url, args.secs]
    command = [
        args.python,
        HERE / "read.py",
        run["engine"],
        run["part"],
        args.folder / run["engine"] / run["part"],
    ]
    command += [url, cache, "--workers", run["workers"], "--secs", args.secs]
    return command + (["--method", run["method"]] if "method" in run else [])


def measure(args, server, run):
    """One run: what it printed, what the server counted, and what it took."""
    cache = args.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    into_page_cache(args.folder / run["engine"] / run["part"])
    server.begin(run["delay_ms"])
    engine = run["engine"]
    url = f"{server.url}/{engine}/{run['part']}"
    if engine == "rectiflow":
        url = f"s3://{engine}/{run['part']}"
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "TORCH_USE_RTLD_GLOBAL": "1",
        "OMP_NUM_THREADS": "1",
    }
    began = time.monotonic()
    with (args.folder / "log.txt").open("a") as log:
        log.write(f"\n== {json.dumps(run)}\n")
        log.flush()
        command = [str(word) for word in command_of(args, run, url, cache)]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        watch = Watch(process.pid)
        watch.start()
        late = threading.Timer(PATIENCE_SECS, end_session, [process.pid])
        late.start()
        output = process.stdout.readline()
    served = server.served()
    watch.ended.set()
    late.cancel()
    end_session(process.pid)
    process.wait()
    cache_bytes = sum(path.lstat().st_size for path in cache.rglob("*") if path.is_file())
    shutil.rmtree(cache, ignore_errors=True)
    result = (
        json.loads(output)
        if output.strip()
        else {
            "error": f"nothing came in {PATIENCE_SECS} s",
            "samples": 0,
            "distinct": 0,
            "latent_bytes": 0,
        }
    )
    took = {
        "wall_secs": time.monotonic() - began,
        "cpu_secs": watch.cpu_secs(),
        "cache_bytes": cache_bytes,
    }
    return {**run, **result, **served, **watch.peak, **took}


def end_session(session):
    while found := members(session):
        for process in found:
            try:
                os.kill(int(process.name), signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def runs_of(args):
    """All runs, round by round, so that what else the machine does falls on all engines alike."""
    for round_number in range(args.rounds):
        for delay_ms in args.delays:
            for engine in args.engines:
                yield {
                    "part": "train",
                    "engine": engine,
                    "delay_ms": delay_ms,
                    "workers": args.workers,
                    "round": round_number,
                }
    for workers in args.more_workers:
        for engine in args.engines:
            if engine != "rectiflow":
                yield {
                    "part": "train",
                    "engine": engine,
                    "delay_ms": args.delays[-1],
                    "workers": workers,
                    "round": 0,
                }
    for engine in args.engines:
        for method in ["per_stream", "device_per_stream"] if engine == "mosaic" else [None]:
            run = {
                "part": "test",
                "engine": engine,
                "delay_ms": args.delays[-1],
                "workers": args.workers,
                "round": 0,
            }
            yield {**run, "method": method} if method else run


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--python", type=pathlib.Path, required=True)
    parser.add_argument("--program", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 20])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--more-workers", type=int, nargs="*", default=[8])
    parser.add_argument("--secs", type=int, default=30)
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=list(NAMES))
    return parser.parse_args()


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.folder / "log.txt").unlink(missing_ok=True)
    subprocess.run(
        [args.program, "pack", args.folder / "rectiflow"], check=True, stdout=subprocess.DEVNULL
    )
    environment = {**os.environ, "TORCH_USE_RTLD_GLOBAL": "1"}
    subprocess.run([args.python, HERE / "write.py", args.folder], check=True, env=environment)
    machine = f"{os.cpu_count()} cores of {processor()}"
    done = [
        {
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "load_before": os.getloadavg(),
        }
    ]
    server = Server(args.program, args.folder)
    try:
        for run in runs_of(args):
            done.append(measure(args, server, run))
            print(line_of(done[-1]), flush=True)
            (args.out / "runs.jsonl").write_text(
                "".join(json.dumps(entry) + "\n" for entry in done)
            )
    finally:
        server.stop()
    samples = json.loads((args.folder / "samples.json").read_text())
    tables = tables_of(args, done, samples)
    (args.out / "tables.md").write_text(tables)
    print(tables)
    if args.page:
        before, rest = args.page.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        args.page.write_text(f"{before}{MARKS[0]}\n{tables}{MARKS[1]}{after}")


def line_of(run):
    words = [run["part"], run["engine"], f"{run['delay_ms']} ms", f"{run['workers']} workers"]
    rate = run.get("samples_per_sec")
    words += [
        f"{run['samples']} samples",
        f"{rate:.0f}/s" if rate else "-",
        f"{run['requests']} requests",
        run["error"] or "",
    ]
    return "  ".join(words)


def median(runs, value):
    """Over the runs that ended without an error; over all where there is none."""
    found = [value(run) for run in [run for run in runs if not run["error"]] or runs]
    found = [number for number in found if number is not None]
    return statistics.median(found) if found else None


def shown(value, form):
    return "-" if value is None else form.format(value)


def tables_of(args, done, samples):
    header, *runs = done
    train = samples["train"]
    parts = [
        f"{header['date']}, {header['machine']}; medians of {args.rounds} rounds, {args.workers} workers each.\n"
    ]

    def amplification(run):
        if not run["samples"]:
            return None
        needed = run["latent_bytes"] + run["samples"] * train["text_bytes"] / train["samples"]
        # rectiflow's loader does not stop at the end of a pass: what it asks for again is the next one's.
        return run["distinct_bytes" if run["engine"] == "rectiflow" else "bytes"] / needed

    for delay_ms in args.delays:
        parts.append(
            f"\n{train['samples']:,} samples in {train['buckets']} buckets, {delay_ms} ms a request:\n\n"
        )
        parts.append(
            "| engine | samples/s | by CPU second | samples a request | fetched / needed | first batch | memory | disk | samples delivered |\n"
        )
        parts.append("|---|---|---|---|---|---|---|---|---|\n")
        for engine in args.engines:
            mine = [
                run
                for run in runs
                if (run["part"], run["engine"], run["delay_ms"], run["workers"])
                == ("train", engine, delay_ms, args.workers)
            ]
            cells = [
                shown(median(mine, lambda run: run.get("samples_per_sec")), "{:,.0f}"),
                shown(
                    median(mine, lambda run: run["samples"] / max(run["cpu_secs"], 0.01)), "{:,.0f}"
                ),
                shown(median(mine, lambda run: run["samples"] / max(run["requests"], 1)), "{:.1f}"),
                shown(median(mine, amplification), "{:.3f}"),
                shown(median(mine, lambda run: run.get("first_batch_secs")), "{:.2f} s"),
                shown(median(mine, lambda run: run["memory_bytes"] / 1e9), "{:.2f} GB"),
                shown(median(mine, lambda run: run["cache_bytes"] / 1e9), "{:.2f} GB"),
                ended(mine),
            ]
            parts.append(f"| {NAMES[engine]} | {' | '.join(cells)} |\n")
    parts.append(f"\nSamples/s at {args.delays[-1]} ms by workers:\n\n")
    counts = sorted({args.workers, *args.more_workers})
    parts.append(f"| engine | {' | '.join(map(str, counts))} |\n|---|{'---|' * len(counts)}\n")
    for engine in args.engines:
        cells = []
        for workers in counts:
            key = ("train", engine, args.delays[-1], workers)
            mine = [
                run
                for run in runs
                if (run["part"], run["engine"], run["delay_ms"], run["workers"]) == key
            ]
            cells.append(shown(median(mine, lambda run: run.get("samples_per_sec")), "{:,.0f}"))
        parts.append(f"| {NAMES[engine]} | {' | '.join(cells)} |\n")
    test = samples["test"]
    parts.append(
        f"\nThe test set, {test['samples']:,} samples in {test['buckets']} buckets, {args.delays[-1]} ms a request:\n\n"
    )
    parts.append(
        "| engine | samples delivered | seconds | requests | what it says |\n|---|---|---|---|---|\n"
    )
    for run in (run for run in runs if run["part"] == "test"):
        name = NAMES[run["engine"]] + (f", `{run['method']}`" if "method" in run else "")
        says = (run["error"] or "").replace("|", "\\|")
        parts.append(
            f"| {name} | {run.get('distinct', 0):,} | {shown(run.get('secs'), '{:.1f}')} | {run['requests']:,} | {says} |\n"
        )
    return "".join(parts)


def ended(runs):
    """How the passes of an engine ended: how many samples came, and what it said if it did not end well."""

    def one(run):
        if run["error"]:
            return f"{run['distinct']:,}, then {run['error']}"
        return (
            f"{run['distinct']:,}" if run["whole_pass"] else f"{run['distinct']:,} when time was up"
        )

    counts = {text: sum(one(run) == text for run in runs) for text in map(one, runs)}
    return "; ".join(
        f"{text} ({count} of {len(runs)})" if len(counts) > 1 else text
        for text, count in counts.items()
    )


if __name__ == "__main__":
    main()
