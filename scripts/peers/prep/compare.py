#!/usr/bin/env python3
"""Prepares the same pictures with rectiflow, datago and Pillow, in turn.

    PYTHONPATH=scripts/peers VENV/bin/python scripts/peers/prep/compare.py FOLDER \\
        --program bench_prep --out RUNS [--kinds jpeg-2 jpeg-24] [--pairs 5] [--page FILE.md]
        [--before bench_prep]

VENV has the packages of requirements-prep.txt. FOLDER (0.3 GB) receives the pictures of
pictures.py. Every run is a process of its own that reads, decodes, resizes and crops the pictures
of one kind, to about 1024x1024, with the files in the page cache. rectiflow and datago take turns,
pair by pair; the ratio is the median over pairs of pictures
per CPU second. PROGRAM is the example bench_prep of rectiflow-data, and `--before` an older one.

Errors are against a reference in float64: the pixels that Pillow (libjpeg-turbo) decodes, resized
by Lanczos with a = 3. All programs resize to the same size, and nothing is cropped.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

import numpy as np
from PIL import Image

import pairs
import pictures

HERE = pathlib.Path(__file__).parent
MARKS = ["<!-- scripts/peers/prep/compare.py writes from here -->", "<!-- to here -->"]
PEERS = ["datago", "pillow", "draft"]
# What each ratio to datago has to reach.
TARGETS = {
    "jpeg-2": 1.6,
    "jpeg-6": 1.35,
    "jpeg-12": 1.3,
    "jpeg-24": 1.6,
    "jpeg-12-srgb": 1.3,
    "png-2": 1.2,
    "png-6": 1.2,
    "webp-2": 1.2,
    "webp-6": 1.2,
}
# Files of a run by megapixels: about a second of one core.
COUNTS = {2: 48, 6: 24, 12: 15, 24: 9}
SECS = 1


def answer(command):
    """The JSON of a program's last line."""
    words = [str(word) for word in command]
    environment = {**os.environ, "RAYON_NUM_THREADS": "2", "DATAGO_MAX_TASKS": "2"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{words[0]} failed with exit code {done.returncode}; its message is above")
    return [json.loads(line) for line in done.stdout.strip().splitlines()]


def linked(folder, kind):
    """A folder with as many links to the pictures of a kind as a run reads."""
    links = folder / "links" / kind
    links.mkdir(parents=True, exist_ok=True)
    files = sorted((folder / kind).iterdir())
    for number in range(COUNTS[pictures.KINDS[kind][1]]):
        original = files[number % len(files)]
        link = links / f"{number:03}{original.suffix}"
        if not link.exists():
            os.link(original, link)
    return links


def run_own(program, folder, kind):
    command = [program, folder / kind, "--secs", SECS, "--step-px", 32]
    return answer(command)[-1]


def run_peer(args, name, kind):
    links = linked(args.folder, kind)
    count = len(list(links.iterdir()))
    found = answer([sys.executable, HERE / "peer.py", name, links, count])[-1]
    if found["pictures"] != count:
        sys.exit(f"{name} read {found['pictures']} of {count} pictures of {links}")
    return found


def weights(source, target):
    """The matrix [target, source] of Lanczos with a = 3, wider where the picture shrinks."""
    scale = source / target
    width = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale - 0.5
    distance = (np.arange(source)[None, :] - centre[:, None]) / width
    matrix = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    return matrix / matrix.sum(axis=1, keepdims=True)


def reference(path, size):
    """A picture in another size, computed in float64."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float64)
    down, across = weights(pixels.shape[0], size[1]), weights(pixels.shape[1], size[0])
    channels = [down @ pixels[..., channel] @ across.T for channel in range(3)]
    return np.clip(np.stack(channels, axis=-1), 0, 255)


def written(args, name, kind):
    """The folder with the pixels of one program, as PNG."""
    out = args.folder / "pixels" / name / kind
    source = args.folder / kind
    for path in out.glob("*"):
        path.unlink()
    if name == "rectiflow":
        answer([args.program, source, "--step-px", 32, "--write", out])
    else:
        answer([sys.executable, HERE / "peer.py", name, source, pictures.SCENES, "--write", out])
    return out


def errors(args, kind):
    """Mean and largest difference from the reference by program, over the pictures of a kind."""
    folders = {name: written(args, name, kind) for name in ["rectiflow", *PEERS]}
    found = {name: [] for name in folders}
    for path in sorted((args.folder / kind).iterdir()):
        first = Image.open(folders["rectiflow"] / f"{path.name}.png")
        expected = reference(path, first.size)
        for name, folder in folders.items():
            pixels = np.asarray(Image.open(folder / f"{path.name}.png"), np.float64)
            difference = np.abs(pixels - expected)
            found[name].append((difference.mean(), difference.max()))
    return {
        name: {
            "mean": float(np.mean([mean for mean, _ in every])),
            "largest": float(max(largest for _, largest in every)),
        }
        for name, every in found.items()
    }


def measure(args, kind):
    """All runs of one kind: pairs of rectiflow and datago, and single runs of the others."""
    own = [("rectiflow", args.program)] + ([("before", args.before)] if args.before else [])
    runs = {name: [] for name in [*(name for name, _ in own), *PEERS]}
    for pair in range(args.pairs):
        for name, program in own if pair % 2 == 0 else own[::-1]:
            runs[name].append(run_own(program, args.folder, kind))
            if name == "rectiflow":
                runs["datago"].append(run_peer(args, "datago", kind))
    for name in ["pillow", "draft"]:
        runs[name].append(run_peer(args, name, kind))
    return runs


def rate(runs, name):
    found = [run["pictures_per_cpu_sec"] for run in runs.get(name, [])]
    return f"{statistics.median(found):.1f}" if found else "-"


def ratio(runs, name):
    """The median over pairs of the first program's speed over another's."""
    both = zip(runs["rectiflow"], runs[name], strict=True)
    return statistics.median(a["pictures_per_cpu_sec"] / b["pictures_per_cpu_sec"] for a, b in both)


def table(results, before):
    """The table of speeds and the table of errors, in Markdown."""
    heads = ["pictures", "rectiflow", "datago", "ratio", "target", "Pillow", "Pillow, `draft`"]
    heads += ["rectiflow before"] if before else []
    lines = [heads, ["---"] * len(heads)]
    for kind, (runs, _) in results.items():
        cells = [kind, rate(runs, "rectiflow"), rate(runs, "datago")]
        cells += [f"{ratio(runs, 'datago'):.2f}", f"{TARGETS[kind]:.2f}"]
        cells += [rate(runs, "pillow"), rate(runs, "draft")]
        lines.append(cells + ([rate(runs, "before")] if before else []))
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    heads = ["pictures", "rectiflow", "datago", "Pillow", "Pillow, `draft`"]
    lines = [heads, ["---"] * len(heads)]
    for kind, (_, found) in results.items():
        every = [found[name] for name in ["rectiflow", *PEERS]]
        lines.append([kind, *(f"{one['mean']:.2f}, {one['largest']:.0f}" for one in every)])
    return text + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=list(pictures.KINDS), default=None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path)
    return parser.parse_args()


def main():
    args = arguments()
    pictures.draw_all(args.folder)
    results = {}
    for kind in args.kinds or pictures.KINDS:
        results[kind] = (measure(args, kind), errors(args, kind))
        print(kind, f"{ratio(results[kind][0], 'datago'):.2f}", flush=True)
    runs = {kind: {"runs": runs, "errors": found} for kind, (runs, found) in results.items()}
    but = {"folder", "program", "out", "before", "page"}
    pairs.write(args.out / "numbers.json", args, but, runs)
    text = f"{pairs.processor()}, {os.cpu_count()} cores; medians of {args.pairs} pairs.\n\n"
    text += table(results, args.before)
    (args.out / "tables.md").write_text(text)
    print(text)
    if args.page:
        pairs.write_between(MARKS, args.page, text)


if __name__ == "__main__":
    main()
