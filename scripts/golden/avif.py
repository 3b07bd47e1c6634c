#!/usr/bin/env python3
"""Makes the AVIF files of crates/rectiflow-data/tests/golden/avif, each with its pixels as PNG.

    python3 scripts/golden/avif.py

Requires avifenc and avifdec 0.11.1 (Debian: libavif-bin) and Pillow 13.0.0. The pixels are what
avifdec decodes to with 16 bits, for which libavif uses its own floating point; for 8 bits it uses
libyuv, whose fixed point is wrong by up to 16 of 255. avifdec does not turn pictures, so those of
TURNED are what Pillow's libavif (1.4.2) decodes to, turned by Pillow. Those of NO_PIXELS have none.
"""

import pathlib
import subprocess
import tempfile

from PIL import Image, ImageOps

GOLDEN = pathlib.Path(__file__).parents[2] / "crates/rectiflow-data/tests/golden"
FOLDER = GOLDEN / "avif"

# Name, mode, size, options of avifenc.
FILES = [
    ("420", "RGB", (41, 27), "--yuv 420"),
    ("422", "RGB", (41, 27), "--yuv 422"),
    ("444", "RGB", (40, 24), "--yuv 444"),
    ("gray", "L", (40, 24), "--yuv 400"),
    ("lossless", "RGB", (40, 24), "--lossless"),
    ("limited", "RGB", (40, 24), "--yuv 420 --range limited --cicp 1/13/1"),
    ("bt2020", "RGB", (40, 24), "--yuv 444 --cicp 1/13/9"),
    ("ten", "RGB", (40, 24), "--yuv 444 --depth 10"),
    ("twelve", "RGB", (40, 24), "--yuv 420 --depth 12 --range limited"),
    ("alpha", "RGBA", (40, 24), "--yuv 444"),
    ("multiplied", "RGBA", (40, 24), "--yuv 444 --premultiply"),
    ("alpha-ten", "RGBA", (40, 24), "--yuv 420 --depth 10"),
    ("profile", "RGB", (40, 24), f"--yuv 444 --icc {GOLDEN / 'adobe-rgb-free.icc'}"),
    ("tiles", "RGB", (192, 128), "--yuv 420 --grid 3x2 --min 40 --max 63"),
    ("tiles-alpha", "RGBA", (128, 128), "--yuv 444 --grid 2x2"),
    ("grain", "RGB", (96, 80), "--yuv 420 -a film-grain-test=1"),
]
TURNED = [
    ("turned", "RGB", (40, 24), "--yuv 444 --irot 1"),
    ("turned-mirrored", "RGB", (40, 24), "--yuv 444 --irot 3 --imir 0"),
    ("mirrored", "RGB", (40, 24), "--yuv 444 --imir 1"),
]
# Colours of Display P3; a curve of HDR; a cut.
NO_PIXELS = [
    ("p3", "RGB", (40, 24), "--yuv 444 --cicp 12/13/6 --min 0 --max 0"),
    ("hdr", "RGB", (40, 24), "--yuv 444 --depth 10 --cicp 9/16/9"),
    ("cut", "RGB", (40, 24), "--yuv 444 --crop 4,4,32,16"),
]


def picture(mode, size):
    """A picture of slopes and an edge."""
    width, height = size
    image = Image.new("RGBA", size)
    for y in range(height):
        for x in range(width):
            edge = 90 if x * height > y * width else 0
            alpha = 255 if 4 * x < 3 * width else 100 + 96 * y // height
            colour = (edge + 160 * x // width, 240 * y // height, 255 - 240 * x // width, alpha)
            image.putpixel((x, y), colour)
    return image.convert(mode)


def encode(source, name, options):
    out = FOLDER / f"{name}.avif"
    command = ["avifenc", *options.split(), "--speed", "6", source, out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def decode(path):
    options = "--depth 16 --upsampling bilinear --png-compress 9"
    command = ["avifdec", *options.split(), path, path.with_suffix(".png")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def without_profile(path):
    """Removes the ICC profile of a PNG, so that its pixels are read as stored."""
    data = path.read_bytes()
    kept, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] != b"iCCP":
            kept.append(data[at:end])
        at = end
    path.write_bytes(b"".join(kept))


def main():
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "source.png"
        for name, mode, size, options in FILES:
            picture(mode, size).save(source)
            decode(encode(source, name, options))
        without_profile(FOLDER / "profile.png")
        for name, mode, size, options in TURNED:
            picture(mode, size).save(source)
            with Image.open(encode(source, name, options)) as image:
                ImageOps.exif_transpose(image).save(FOLDER / f"{name}.png")
        for name, mode, size, options in NO_PIXELS:
            # The green of sRGB as Display P3 has it.
            plain = Image.new(mode, size, (117, 251, 76))
            plain.save(source)
            encode(source, name, options)


if __name__ == "__main__":
    main()
