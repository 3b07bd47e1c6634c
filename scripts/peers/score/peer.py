#!/usr/bin/env python3
"""Prepares pictures with Pillow and NumPy, scores them with Python's onnxruntime, prints JSON.

    python3 scripts/peers/score/peer.py FOLDER --model FILE [--preset siglip|wd] [--batch 16]
        [--threads 1] [--prepare-only]

With one thread as most scripts do it: open, prepare and stack a batch, run it, begin the next. With
several, a pool prepares pictures ahead while the model runs. Both use onnxruntime's own defaults.
"""

import argparse
import concurrent.futures
import json
import pathlib
import time

import numpy as np
import onnxruntime
from PIL import Image


def padded(image, side):
    """As dghs-imgutils and the WD taggers' own page prepare a picture; [h, w, 3], blue first."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32)[:, :, ::-1]


def stretched(image, width, height):
    """-1 to 1, [3, h, w]."""
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(image, np.float32) * np.float32(1 / 255)
    return ((values - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)


class Preparation:
    def __init__(self, session, preset):
        self.preset = preset
        self.input = session.get_inputs()[0]

    def __call__(self, path):
        image = Image.open(path).convert("RGB")
        shape = self.input.shape
        if self.preset == "wd":
            return padded(image, shape[1])
        return stretched(image, shape[3], shape[2])


def batches(files, prepare, args):
    """The batches in turn, prepared by one thread or by several ahead."""
    chunks = [files[at : at + args.batch] for at in range(0, len(files), args.batch)]
    if args.threads == 1:
        for chunk in chunks:
            yield chunk, np.stack([prepare(path) for path in chunk])
        return
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        ahead = [[pool.submit(prepare, path) for path in chunk] for chunk in chunks[:2]]
        for number, chunk in enumerate(chunks):
            if number + 2 < len(chunks):
                ahead.append([pool.submit(prepare, path) for path in chunks[number + 2]])
            yield chunk, np.stack([future.result() for future in ahead[number]])
            ahead[number] = None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--preset", choices=["siglip", "wd"], default="siglip")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepare-only", action="store_true")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    prepare = Preparation(session, args.preset)
    files = sorted(args.folder.iterdir())
    # As the other program: the first run of a model is not counted.
    sizes = [size if isinstance(size, int) else 1 for size in prepare.input.shape]
    session.run(None, {prepare.input.name: np.zeros(sizes, np.float32)})
    scores = {}
    start = time.perf_counter()
    for chunk, values in batches(files, prepare, args):
        if args.prepare_only:
            rows = [values[number].ravel()[values[0].size // 2] for number in range(len(chunk))]
        else:
            rows = session.run(None, {prepare.input.name: values})[0]
        for path, row in zip(chunk, rows, strict=True):
            scores[path.name] = [float(number) for number in np.ravel(row)]
    secs = time.perf_counter() - start
    answer = {"pictures": len(files), "secs": secs, "pictures_per_sec": len(files) / secs}
    print(json.dumps(answer | {"scores": scores}))


if __name__ == "__main__":
    main()
