#!/usr/bin/env python3
"""Prepares pictures with another program, and prints the processor time as JSON.

    python3 scripts/peers/prep/peer.py datago|pillow|draft FOLDER COUNT [--write OUT]

Reads COUNT files of FOLDER, which may be links to the same pictures, decodes each, resizes it with
Lanczos to its bucket and crops. `draft` is Pillow with JPEG decoded at a reduced scale where the
target allows it. With --write the pixels are kept as PNG instead.
"""

import argparse
import json
import pathlib
import time

from PIL import Image

# rectiflow's buckets of multiples of 32, and datago's.
AREA, STEP = 1024, 32


def bucket(width, height):
    """The sides of multiples of STEP, at most AREA squared in all, nearest to the shape."""
    patches = (AREA // STEP) ** 2
    sides = [(w, patches // w) for w in range(16, 65)]
    sides += [(w, h) for h, w in sides]
    w, h = min(sides, key=lambda side: abs(side[0] / side[1] - width / height))
    return w * STEP, h * STEP


def with_pillow(path, draft):
    image = Image.open(path)
    size = bucket(*image.size)
    if draft:
        image.draft("RGB", size)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def run_pillow(folder, count, draft, out):
    files = sorted(folder.iterdir())[:count]
    for path in files:
        image = with_pillow(path, draft)
        if out:
            image.save(out / f"{path.name}.png")
    return len(files)


def datago_config(folder, count):
    image = {"crop_and_resize": True, "default_image_size": AREA, "downsampling_ratio": STEP}
    image |= {"min_aspect_ratio": 0.25, "max_aspect_ratio": 4.0, "pre_encode_images": False}
    return {
        "source_type": "file",
        "source_config": {"root_path": str(folder), "rank": 0, "world_size": 1},
        "image_config": image,
        "prefetch_buffer_size": 8,
        "samples_buffer_size": 8,
        "limit": count,
    }


def run_datago(folder, count, out):
    from datago import DatagoClient

    client = DatagoClient(json.dumps(datago_config(folder, count)))
    found = 0
    while (sample := client.get_sample()) is not None:
        found += 1
        if out:
            name = pathlib.Path(json.loads(sample.id)).name
            sample.image.save(out / f"{name}.png")
    client.stop()
    return found


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("program", choices=["datago", "pillow", "draft"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--write", type=pathlib.Path)
    args = parser.parse_args()
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
    began, cpu_before = time.perf_counter(), time.process_time()
    if args.program == "datago":
        pictures = run_datago(args.folder, args.count, args.write)
    else:
        pictures = run_pillow(args.folder, args.count, args.program == "draft", args.write)
    secs, cpu_secs = time.perf_counter() - began, time.process_time() - cpu_before
    answer = {"pictures": pictures, "pictures_per_sec": pictures / secs}
    print(json.dumps({**answer, "pictures_per_cpu_sec": pictures / cpu_secs}))


if __name__ == "__main__":
    main()
