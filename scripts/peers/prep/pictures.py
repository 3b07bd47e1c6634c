#!/usr/bin/env python3
"""Draws the pictures that the preparation is measured with.

    python3 scripts/peers/prep/pictures.py FOLDER

Photographs are not at hand, so these are seeded scenes with the statistics of photographs: leaves
of all sizes that cover each other (as edges do in nature), each with a texture whose amplitude
falls as one over the frequency, a blur of a lens and a sensor's noise. A JPEG of quality 90 takes
2.5 to 3.5 bits a pixel, as a camera's does. Every folder below FOLDER holds one kind: jpeg-2 is
JPEG, 4:2:0, of 2 megapixels. The sides are 3:2, so that no program has to crop and all of them
compute the same pixels. What is there already is kept.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFilter

# Sides in pixels by megapixels.
SIDES = {2: (1752, 1168), 6: (3000, 2000), 12: (4248, 2832), 24: (6000, 4000)}
# Kind of file, megapixels, and whether a profile is embedded.
KINDS = {
    "jpeg-2": ("jpeg", 2, False),
    "jpeg-6": ("jpeg", 6, False),
    "jpeg-12": ("jpeg", 12, False),
    "jpeg-24": ("jpeg", 24, False),
    "jpeg-12-srgb": ("jpeg", 12, True),
    "png-2": ("png", 2, False),
    "png-6": ("png", 6, False),
    "webp-2": ("webp", 2, False),
    "webp-6": ("webp", 6, False),
}
SCENES = 3
# How to save each kind of file.
OPTIONS = {
    "jpeg": {"quality": 90, "subsampling": "4:2:0"},
    "png": {"compress_level": 6},
    "webp": {"quality": 90, "method": 2},
}


def leaves(rng, width, height):
    """Ellipses of all sizes that cover each other; the number of size r falls as r to the -3."""
    image = Image.new("RGB", (width, height), (90, 100, 110))
    draw = ImageDraw.Draw(image)
    smallest, largest = height / 150, height / 3
    # The inverse of the distribution of sizes, largest first.
    uniform = np.sort(rng.random(3000))
    ratio = (smallest / largest) ** 2
    sizes = smallest / np.sqrt(uniform * (1 - ratio) + ratio)
    for size in sizes:
        x, y = rng.random() * width, rng.random() * height
        across = size * (0.4 + 0.6 * rng.random())
        gray = 255 * rng.random() ** 1.3
        colour = np.clip(gray + 20 * rng.standard_normal(3), 0, 255).astype(int)
        draw.ellipse((x - size, y - across, x + size, y + across), fill=tuple(map(int, colour)))
    return np.asarray(image, np.float32)


def texture(rng, width, height):
    """Noise whose amplitude falls as one over the frequency, with a standard deviation of 1."""
    white = np.fft.rfft2(rng.standard_normal((height, width), np.float32))
    down = np.fft.fftfreq(height)[:, None] * height
    across = np.fft.rfftfreq(width)[None, :] * width
    frequency = np.sqrt(down**2 + across**2)
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(white / frequency, (height, width)).astype(np.float32)
    return noise / noise.std()


def scene(seed, width, height):
    """A picture, RGB."""
    rng = np.random.default_rng([seed, width])
    pixels = leaves(rng, width, height)
    light = texture(rng, width, height)[..., None]
    tint = texture(rng, width, height)[..., None] * np.array([5, -2, -5], np.float32)
    pixels += 22 * light + tint
    blurred = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    blurred = blurred.filter(ImageFilter.GaussianBlur(0.6))
    pixels = np.asarray(blurred, np.float32)
    pixels += 3.0 * rng.standard_normal((height, width, 1), np.float32)
    pixels += 1.0 * rng.standard_normal((height, width, 3), np.float32)
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def draw_all(folder, kinds=tuple(KINDS)):
    """Draws what is missing of these kinds."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    missing = {}
    for kind in kinds:
        form, megapixels, has_profile = KINDS[kind]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for seed in range(SCENES):
            path = folder / kind / f"{seed}.{form}"
            if not path.exists():
                missing.setdefault((megapixels, seed), []).append((path, form, has_profile))
    for (megapixels, seed), files in missing.items():
        picture = scene(seed, *SIDES[megapixels])
        for path, form, has_profile in files:
            options = {**OPTIONS[form], **({"icc_profile": profile} if has_profile else {})}
            picture.save(path, form, **options)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=pathlib.Path)
    draw_all(parser.parse_args().folder)


if __name__ == "__main__":
    main()
