#!/usr/bin/env python3
"""Measures `rectiflow prep --stage list` on many samples: seconds and the largest resident memory.

    python3 scripts/listing_scale.py RECTIFLOW FOLDER [--rows 1000000] [--out FILE.json] [KIND...]

Makes sources in FOLDER and lists each; no picture has bytes, since none is opened. Kinds:

- index: tars with an index as webshart writes it, 100,000 members each, with width and height. The
  tars are files with holes, in which only the headers that a listing compares are written.
- folder: files of Danbooru's kind in 1,000 folders, and a table of JSON lines with a row for each:
  tags by class, rating, score, size. The filter asks for four columns.

Each listing is a process of its own. The result is compared with what was made.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import time

MEMBERS = 100_000
FILTER = "rating in [g, s] and score >= 5 and not is_deleted and not tag:comic"
SIZES = [(1024, 1024), (1216, 832), (832, 1216), (600, 2000), (120, 90), (2048, 2048)]
TAGS = ["1girl", "solo", "long_hair", "smile", "outdoors", "sky", "tree", "comic", "text", "hat"]


def header(name, size):
    """A tar header of a regular file."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[156] = ord("0")
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def make_index(folder, rows):
    """Tars with an index. Returns the number of usable samples."""
    folder.mkdir(parents=True)
    draw = random.Random(1)
    usable = 0
    for first in range(0, rows, MEMBERS):
        count = min(MEMBERS, rows - first)
        shard = folder / f"{first // MEMBERS:05}.tar"
        size = 512 * count + 1024
        with shard.open("wb") as tar, shard.with_suffix(".json").open("w") as index:
            index.write(f'{{"filesize": {size}, "files": {{')
            for number in range(count):
                width, height = draw.choice(SIZES)
                usable += min(width, height) >= 256
                name = f"{first + number:09}.webp"
                entry = f'{{"offset": {512 * (number + 1)}, "length": 0'
                entry += f', "width": {width}, "height": {height}, "caption": "a picture"}}'
                index.write(f'{"," if number else ""}"{name}": {entry}')
                if number in (0, (count - 1) // 2, count - 1):
                    tar.seek(512 * number)
                    tar.write(header(name, 0))
            index.write("}}")
            tar.truncate(size)
    return usable


def make_folder(folder, rows):
    """Empty files and a table with their posts. Returns the number of usable samples."""
    draw = random.Random(2)
    usable = 0
    for number in range(1000):
        (folder / f"{number:04}").mkdir(parents=True)
    with (folder / "posts.jsonl").open("w") as table:
        for number in range(1, rows + 1):
            (folder / f"{number % 1000:04}" / f"{number}.webp").touch()
            width, height = draw.choice(SIZES)
            tags = draw.sample(TAGS, 4)
            rating = draw.choice("gsqe")
            score = draw.randrange(-5, 50)
            row = {"id": number, "rating": rating, "score": score, "image_width": width}
            row |= {"image_height": height, "is_deleted": number % 50 == 0}
            row |= {"tag_string_general": " ".join(tags), "tag_string_artist": f"a{number % 999}"}
            table.write(json.dumps(row) + "\n")
            passes = rating in "gs" and score >= 5 and number % 50 != 0 and "comic" not in tags
            usable += passes and min(width, height) >= 256
    return usable


def listed(rectiflow, source, out, options):
    """Lists a source. Returns the answer, the seconds and the bytes of memory."""
    command = [rectiflow, "--json", "prep", source, "--out", out, "--stage", "list"]
    command += ["--workers", "8", *options]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    secs = time.monotonic() - start
    if status != 0:
        sys.exit(f"{source} cannot be listed: status {status}")
    return json.loads(answer)["listing"], secs, usage.ru_maxrss * 1024


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return f"{facts['model name']}, family {facts['cpu family']}, model {facts['model']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rectiflow", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("kinds", nargs="*", default=["folder", "index"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    makers = {
        "index": (make_index, []),
        "folder": (make_folder, ["--set", f"prep.filter={FILTER}"]),
    }
    runs = []
    for kind in args.kinds:
        make, options = makers[kind]
        source = args.folder / f"{kind}-{args.rows}"
        usable_file = args.folder / f"{kind}-{args.rows}.usable"
        if not usable_file.exists():
            print(f"making {source}", file=sys.stderr, flush=True)
            usable_file.write_text(str(make(source, args.rows)))
        answer, secs, peak = listed(args.rectiflow, source, args.folder / "out", options)
        expected = (args.rows, args.rows, int(usable_file.read_text()))
        found = (answer["samples"], answer["with_size"], answer["usable"])
        if found != expected:
            sys.exit(f"{kind}: expected samples, sizes and usable {expected}, found {found}")
        print(f"{kind}: {args.rows} rows in {secs:.1f} s, {peak / 1e9:.2f} GB", flush=True)
        runs.append({"kind": kind, "rows": args.rows, "secs": secs, "peak_bytes": peak})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"processor": processor(), "cores": os.cpu_count(), "runs": runs}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
