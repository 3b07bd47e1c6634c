#!/usr/bin/env python3
"""Records losses and gradient norms of clean runs, which fit and judge the guard's limits.

    python3 scripts/guard_runs.py RECTIFLOW FOLDER FILE [SEED...]

Packs small data sets into FOLDER and trains the tiny SDXL on them for 150 updates with the guard
off: each kind of run with the seeds 1 to 10, unless others are named. FOLDER must already hold the
coloured squares of `tests/runs` and their base (`cargo run --release --example guard_squares --
FOLDER`). Adds a line per run to FILE: its settings, a colon, and `loss,norm` of each update as
natural logarithms in thousandths. Runs that are in FILE already are not repeated, so the script can
be stopped at any time. A run takes 5 to 15 s on one core. docs/guard.md names the machine of the
recorded runs.
"""

import json
import math
import os
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
UPDATES = 150
SIDE_PX = 64
PREP = f"""[prep]
area_px = {SIDE_PX * SIDE_PX}
step_px = 32
bucket_min_px = 32
bucket_max_px = 128
min_side_px = 32
test_count = 2
"""
# Half of the tiny UNet, a quarter of its time.
SMALL = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 1],
    "layers_per_block": 1,
}

QUICK = "optimizer.beta2=0.99"

# Data set, base (trained to predict noise; a smaller UNet of random weights; that of tests/runs),
# micro-batches, samples of each, rate, dtype, further settings.
KINDS = [
    ("squares", "tests", 2, 4, "1e-3", "fp32", []),
    ("squares", "random", 1, 8, "1e-3", "fp32", []),
    ("squares", "random", 1, 8, "3e-3", "bf16", []),
    ("squares", "random", 1, 4, "1e-3", "bf16", []),
    ("squares", "random", 1, 4, "3e-4", "fp32", ["lr.warmup_samples=300"]),
    ("squares", "random", 1, 2, "1e-3", "fp32", []),
    ("squares", "random", 1, 2, "3e-3", "bf16", []),
    ("squares", "random", 1, 4, "2e-3", "fp32", ["lr.decay='cosine'"]),
    ("emoji", "trained", 1, 8, "5e-4", "fp32", []),
    ("emoji", "trained", 1, 4, "1e-3", "bf16", []),
    ("emoji", "random", 1, 8, "1e-3", "bf16", []),
    ("emoji", "random", 1, 4, "1e-3", "fp32", []),
    ("emoji", "random", 1, 2, "3e-4", "fp32", ["objective.parameterization='eps'"]),
    ("emoji", "random", 2, 1, "1e-3", "bf16", []),
    ("few", "trained", 1, 4, "5e-4", "fp32", []),
    ("few", "random", 1, 4, "1e-3", "bf16", ["lr.decay='cosine'"]),
    ("few", "random", 1, 2, "1e-3", "fp32", []),
    ("mixed", "trained", 1, 4, "5e-4", "bf16", []),
    ("mixed", "random", 1, 4, "1e-3", "bf16", []),
    ("mixed", "random", 1, 2, "1e-3", "fp32", []),
    ("squares", "tests", 2, 4, "1e-3", "fp32", ["train.clip_norm=1e9"]),
    ("emoji", "trained", 1, 8, "5e-4", "fp32", [QUICK]),
    ("emoji", "trained", 1, 4, "1e-3", "bf16", [QUICK]),
    ("emoji", "trained", 1, 4, "1e-3", "fp32", ["objective.parameterization='eps'", QUICK]),
    ("emoji", "trained", 1, 2, "5e-4", "fp32", ["objective.parameterization='eps'", QUICK]),
    ("emoji", "random", 1, 8, "1e-3", "bf16", [QUICK]),
    ("emoji", "random", 1, 4, "1e-3", "fp32", [QUICK]),
    ("emoji", "random", 1, 2, "3e-4", "fp32", [QUICK]),
    ("emoji", "random", 2, 1, "1e-3", "bf16", [QUICK]),
    ("few", "trained", 1, 4, "5e-4", "fp32", [QUICK]),
    ("few", "random", 1, 4, "1e-3", "bf16", ["lr.decay='cosine'", QUICK]),
    ("few", "random", 1, 2, "1e-3", "fp32", [QUICK]),
    ("colours", "random", 1, 8, "1e-3", "fp32", [QUICK]),
    ("colours", "random", 1, 8, "3e-3", "bf16", [QUICK]),
    ("colours", "random", 1, 4, "1e-3", "bf16", [QUICK]),
    ("colours", "random", 1, 4, "3e-4", "fp32", ["lr.warmup_samples=300", QUICK]),
    ("colours", "random", 1, 2, "1e-3", "fp32", [QUICK]),
    ("colours", "random", 1, 2, "3e-3", "bf16", [QUICK]),
    ("mixed", "trained", 1, 4, "5e-4", "bf16", [QUICK]),
    ("mixed", "random", 1, 8, "1e-3", "fp32", [QUICK]),
    ("mixed", "random", 1, 4, "1e-3", "bf16", [QUICK]),
    ("mixed", "random", 1, 2, "1e-3", "fp32", [QUICK]),
]


def png(path, pixels):
    """Writes rows of (red, green, blue) as a picture."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in pixels)
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def square(rng, number):
    """One of three colours with a little noise."""
    colour = [200 if channel == number % 3 else 60 for channel in range(3)]
    return [
        [[value + rng.randrange(-20, 21) for value in colour] for _ in range(SIDE_PX)]
        for _ in range(SIDE_PX)
    ]


def noise(rng, _):
    return [
        [[rng.randrange(256) for _ in range(3)] for _ in range(SIDE_PX)] for _ in range(SIDE_PX)
    ]


def draw(folder, picture, caption, count):
    rng = random.Random(5)
    for number in range(count):
        name = folder / f"{picture.__name__}-{number:03}"
        png(name.with_suffix(".png"), picture(rng, number))
        name.with_suffix(".txt").write_text(caption(number))


def emoji(folder, step):
    with tarfile.open(ROOT / "assets/emoji/emoji.tar") as tar:
        lines = tar.extractfile("index.jsonl").read().splitlines()[: 16 * 50 : step]
        for entry in map(json.loads, lines):
            name = folder / entry["file"]
            name.write_bytes(tar.extractfile(entry["file"]).read())
            name.with_suffix(".txt").write_text(entry["name"])


def pictures(name, folder):
    if name == "colours":
        draw(folder, square, lambda number: f"a {('red', 'green', 'blue')[number % 3]} square", 61)
    else:
        emoji(folder, {"emoji": 1, "few": 32, "mixed": 8}[name])
    if name == "mixed":
        draw(folder, noise, lambda number: "noise", 12)


def pack(rectiflow, folder, name):
    """Packs a data set unless it is there."""
    done = folder / f"{name}.packed"
    if done.exists():
        return
    if name == "squares":
        if not (folder / "squares-packed").exists():
            sys.exit(
                "the coloured squares are missing: "
                "cargo run --release --example guard_squares -- FOLDER"
            )
        return
    source = folder / name
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    pictures(name, source)
    recipe = folder / "prep.toml"
    recipe.write_text(PREP)
    command = [rectiflow, "prep", source, "--out", folder / f"{name}-packed", "--recipe", recipe]
    subprocess.run(
        [*command, "--vae", ROOT / "assets/tiny-sdxl/vae"], check=True, stderr=subprocess.DEVNULL
    )
    done.touch()


def unpack_bases(folder):
    if (folder / "random").exists():
        return
    shutil.rmtree(folder / "trained", ignore_errors=True)
    with tarfile.open(ROOT / "assets/tiny-sdxl/base.tar.gz") as tar:
        tar.extractall(folder / "trained", filter="data")
    shutil.copytree(ROOT / "assets/tiny-sdxl/vae", folder / "trained/vae")
    shutil.copytree(folder / "trained", folder / "random.part")
    config = folder / "random.part/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SMALL))
    (folder / "random.part").rename(folder / "random")


def recipe(folder, kind, seed):
    data, base, micro_batches, micro_batch, rate, dtype, _ = kind
    return f"""[run]
dir = '{folder / "run"}'
seed = {seed}
[model]
base = '{folder / base}'
random = [{"'unet'" if base == "random" else ""}]
[[data]]
path = '{folder / f"{data}-packed"}'
[train]
samples = {UPDATES * micro_batches * micro_batch}
micro_batch = {micro_batch}
micro_batches = {micro_batches}
dtype = '{dtype}'
[lr]
peak = {rate}
decay = 'constant'
[guard]
enabled = false
vitals_every_updates = 0
[test]
every_steps = 100000
[checkpoint]
every_steps = 100000
[preview]
every_steps = 100000
"""


def record(rectiflow, folder, kind, seed):
    """The losses and norms of a run, as a line's numbers."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    path = folder / "run.toml"
    path.write_text(recipe(folder, kind, seed))
    overrides = [word for key in kind[-1] for word in ("--set", key)]
    # Norms are summed in the order of one thread.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [rectiflow, "train", path, *overrides]
    subprocess.run(
        command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    events = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    steps = [event for event in events if event["event"] == "step"]
    # A few more where a bucket's last batch is not full.
    steps = steps[:UPDATES]
    assert len(steps) == UPDATES, len(steps)
    return " ".join(
        f"{thousandths(step['loss'])},{thousandths(step['gradient_norm'])}" for step in steps
    )


def thousandths(value):
    return round(1000 * math.log(float(value)))


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    rectiflow, folder, file = (
        sys.argv[1],
        pathlib.Path(sys.argv[2]).resolve(),
        pathlib.Path(sys.argv[3]),
    )
    seeds = [int(seed) for seed in sys.argv[4:]] or range(1, 11)
    unpack_bases(folder)
    for seed in seeds:
        for kind in KINDS:
            data, base, micro_batches, micro_batch, rate, dtype, more = kind
            # As the recorded runs are called.
            name = " ".join(
                [
                    data,
                    base,
                    f"{micro_batches}x{micro_batch}",
                    rate,
                    dtype,
                    *more,
                    "seed",
                    str(seed),
                ]
            )
            known = file.read_text().splitlines() if file.exists() else []
            if any(line.startswith(f"{name}: ") for line in known):
                continue
            pack(rectiflow, folder, data)
            line = f"{name}: {record(rectiflow, folder, kind, seed)}\n"
            with file.open("a") as output:
                output.write(line)
            print(name, flush=True)


if __name__ == "__main__":
    main()
