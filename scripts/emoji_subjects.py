"""The demo's subjects as arrays and the pictures composed of them, for scripts/train_tiny_vae.py.

It follows crates/rectiflow-data/examples/emoji_pictures.rs, the demo's own program: same margin,
same backgrounds, same held-out subjects. Pixels may differ in the last bit, since the resampling
code differs.
"""

import io
import json
import math
import tarfile

import numpy as np
from blake3 import blake3
from PIL import Image

# Picture size over subject size, on both axes.
MARGIN = 1.3
BACKGROUNDS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (200, 40, 40),
    "yellow": (245, 205, 60),
    "green": (60, 150, 80),
    "blue": (50, 90, 200),
    "purple": (120, 60, 160),
}
NUM_HELD_OUT = 64
AREA_PX = 128 * 128
STEP_PX = 32
SIDES_PX = (64, 256)


def read_picture(tar, file):
    return Image.open(io.BytesIO(tar.extractfile(file).read())).convert("RGBA")


def load(archive):
    """(train, held out): lists of RGBA pictures; the names of the held-out ones hash lowest."""
    with tarfile.open(archive) as tar:
        lines = tar.extractfile("index.jsonl").read().decode().splitlines()
        entries = [json.loads(line) for line in lines]
        named = sorted(
            (blake3(entry["name"].encode()).digest(), read_picture(tar, entry["file"]))
            for entry in entries
        )
    pictures = [picture for _, picture in named]
    return pictures[NUM_HELD_OUT:], pictures[:NUM_HELD_OUT]


def buckets():
    """NovelAI's rule at the demo's settings.

    For every side the largest other side within the area, in both orientations.
    """
    sides = range(SIDES_PX[0], SIDES_PX[1] + 1, STEP_PX)
    found = set()
    for side in sides:
        other = min(SIDES_PX[1], AREA_PX // side // STEP_PX * STEP_PX)
        found |= {(side, other), (other, side)}
    return sorted(found)


def compose(subject, background, scale=1.0):
    """The subject in the middle of a plain picture, `scale` of its archived size, RGB."""
    width, height = (max(1, round(side * scale)) for side in subject.size)
    if scale != 1.0:
        subject = subject.resize((width, height), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (round(width * MARGIN), round(height * MARGIN)), background)
    picture.paste(subject, ((picture.width - width) // 2, (picture.height - height) // 2), subject)
    return picture


def at_bucket(picture):
    """Resized to cover the nearest bucket, cropped in the middle: what the demo's VAE sees."""
    aspect = math.log(picture.width / picture.height)
    width, height = min(buckets(), key=lambda b: abs(math.log(b[0] / b[1]) - aspect))
    scale = max(width / picture.width, height / picture.height)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height))


def draw_background(rng):
    """Black, white, a named colour or any colour, with a quarter of the probability each."""
    kind = rng.integers(4)
    if kind < 2:
        return (0, 0, 0) if kind == 0 else (255, 255, 255)
    if kind == 2:
        return list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))]
    return tuple(int(value) for value in rng.integers(0, 256, 3))


def to_array(picture):
    """[3, h, w] float32 in [-1, 1]."""
    return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
