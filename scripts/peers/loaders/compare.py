#!/usr/bin/env python3
"""Reads the same samples from one server with rectiflow's loader and with four others, in turn.

    python3 scripts/peers/loaders/compare.py FOLDER --python VENV/bin/python --program side_by_side
        --out RUNS [--rounds 2] [--delays 0 20] [--workers 4] [--more-workers 8] [--secs 30]
        [--engines ...] [--page FILE.md]

FOLDER (13 GB) holds the samples, packed by each engine in its own format, the engines' caches, and
their messages, log.txt. Every run is a process of its own that starts with an empty cache and reads
one pass in batches of 16 of one shape. The server, an example program of rectiflow-data, delays
each answer and counts requests and bytes. Its files are in the page cache. RUNS receives every
number, runs.jsonl, and the tables, tables.md, which are also written between the two marks of the
page. The engines are in engine_*.py, the samples in samples.py.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time

import pairs
from machine import processor
from tables import NAMES, Tables

HERE = pathlib.Path(__file__).parent
# Around the tables in the page.
MARKS = ["<!-- scripts/peers/loaders/compare.py writes from here -->", "<!-- to here -->"]
# Limit for a run, including its first batch.
PATIENCE_SECS = 180


class Server:
    """The object store; it counts from the last `begin`."""

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
                fields = stat_fields(process)
                rollup = (process / "smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            kib = {line.split()[0][:-1]: int(line.split()[1]) for line in rollup[1:]}
            # Pages of files can be dropped: libraries and caches on disk count in rss_bytes only.
            now["memory_bytes"] += 1024 * (kib["Pss_Anon"] + kib["Pss_Shmem"])
            now["rss_bytes"] += 1024 * kib["Rss"]
            now["processes"] += 1
            self.ticks[process.name] = int(fields[11]) + int(fields[12])
        self.peak = {key: max(value, now[key]) for key, value in self.peak.items()}

    def cpu_secs(self):
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")


def stat_fields(process):
    """The fields of /proc/PID/stat after the program's name."""
    return (process / "stat").read_text().rsplit(")", 1)[1].split()


def members(session):
    """The folders in /proc of the live processes of a session."""
    found = []
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                fields = stat_fields(process)
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(process)
    return found


def end_session(session):
    while found := members(session):
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.05)


def into_page_cache(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def command_of(args, run, server, cache):
    engine, part = run["engine"], run["part"]
    if engine == "rectiflow":
        return [args.program, part, f"s3://{engine}/{part}", args.secs]
    packed, url = args.folder / engine / part, f"{server.url}/{engine}/{part}"
    command = [args.python, HERE / "read.py", engine, part, packed, url, cache]
    command += ["--workers", run["workers"], "--secs", args.secs]
    return command + (["--method", run["method"]] if "method" in run else [])


def environment_of(server):
    return {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "TORCH_USE_RTLD_GLOBAL": "1",
        "OMP_NUM_THREADS": "1",
    }


def answer_of(process):
    """The line that a run prints; a run that takes too long is killed and counts as failed."""
    late = threading.Timer(PATIENCE_SECS, end_session, [process.pid])
    late.start()
    output = process.stdout.readline()
    late.cancel()
    if output.strip():
        return json.loads(output)
    error = f"no answer in {PATIENCE_SECS} s"
    return {"error": error, "samples": 0, "distinct": 0, "latent_bytes": 0}


def measure(args, server, run):
    """One run: its answer, the server's counts, and the memory and time it took."""
    cache = args.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    into_page_cache(args.folder / run["engine"] / run["part"])
    server.begin(run["delay_ms"])
    began = time.monotonic()
    with (args.folder / "log.txt").open("a") as log:
        log.write(f"\n== {json.dumps(run)}\n")
        log.flush()
        process = subprocess.Popen(
            [str(word) for word in command_of(args, run, server, cache)],
            env=environment_of(server),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        watch = Watch(process.pid)
        watch.start()
        answer = answer_of(process)
    served = server.served()
    watch.ended.set()
    end_session(process.pid)
    process.wait()
    cache_bytes = sum(path.lstat().st_size for path in cache.rglob("*") if path.is_file())
    shutil.rmtree(cache, ignore_errors=True)
    took = {
        "wall_secs": time.monotonic() - began,
        "cpu_secs": watch.cpu_secs(),
        "cache_bytes": cache_bytes,
    }
    return {**run, **answer, **served, **watch.peak, **took}


def run_of(part, engine, delay_ms, workers, round_number=0):
    return {
        "part": part,
        "engine": engine,
        "delay_ms": delay_ms,
        "workers": workers,
        "round": round_number,
    }


def runs_of(args):
    """All runs, round by round, so that other load on the machine affects all engines alike."""
    for round_number in range(args.rounds):
        for delay_ms in args.delays:
            for engine in args.engines:
                yield run_of("train", engine, delay_ms, args.workers, round_number)
    for workers in args.more_workers:
        for engine in args.engines:
            if engine != "rectiflow":
                yield run_of("train", engine, args.delays[-1], workers)
    for engine in args.engines:
        run = run_of("test", engine, args.delays[-1], args.workers)
        if engine == "mosaic":
            yield {**run, "method": "per_stream"}
            yield {**run, "method": "device_per_stream"}
        else:
            yield run


def line_of(run):
    words = [run["part"], run["engine"], f"{run['delay_ms']} ms", f"{run['workers']} workers"]
    rate = run.get("samples_per_sec")
    words += [f"{run['samples']} samples", f"{rate:.0f}/s" if rate else "-"]
    words += [f"{run['requests']} requests", run["error"] or ""]
    return "  ".join(words)


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
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


def pack(args):
    """Packs the samples in every engine's format."""
    pack = [args.program, "pack", args.folder / "rectiflow"]
    subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
    environment = {**os.environ, "TORCH_USE_RTLD_GLOBAL": "1"}
    subprocess.run([args.python, HERE / "write.py", args.folder], check=True, env=environment)


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.folder / "log.txt").unlink(missing_ok=True)
    pack(args)
    header = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "load_before": os.getloadavg(),
    }
    runs = []
    server = Server(args.program, args.folder)
    try:
        for run in runs_of(args):
            runs.append(measure(args, server, run))
            print(line_of(runs[-1]), flush=True)
            lines = [json.dumps(entry) + "\n" for entry in [header, *runs]]
            (args.out / "runs.jsonl").write_text("".join(lines))
    finally:
        server.stop()
    samples = json.loads((args.folder / "samples.json").read_text())
    tables = Tables(args, runs, samples).page(header)
    (args.out / "tables.md").write_text(tables)
    print(tables)
    if args.page:
        pairs.write_between(MARKS, args.page, tables)


if __name__ == "__main__":
    main()
