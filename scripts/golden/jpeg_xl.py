#!/usr/bin/env python3
"""Makes the JPEG XL files of crates/rectiflow-data/tests/golden/jxl, each with its pixels as PNG.

    python3 scripts/golden/jpeg_xl.py

Requires cjxl and djxl 0.7.0 (Debian: libjxl-tools) and Pillow 13.0.0. The PNG of a lossless file is
the picture that was encoded; that of a lossy one is what djxl decodes.
"""

import pathlib
import subprocess
import tempfile

from PIL import Image

GOLDEN = pathlib.Path(__file__).parents[2] / "crates/rectiflow-data/tests/golden"
WIDTH, HEIGHT = 40, 24


def picture(mode):
    """A picture of slopes and an edge."""
    image = Image.new("RGBA", (WIDTH, HEIGHT))
    for y in range(HEIGHT):
        for x in range(WIDTH):
            edge = 90 if x * HEIGHT > y * WIDTH else 0
            alpha = 255 if x < 30 else 100 + 4 * y
            image.putpixel((x, y), (edge + 4 * x, 10 * y, 255 - 6 * x, alpha))
    return image.convert(mode)


def deep(path):
    """The picture with 16 bits a sample, as PPM."""
    values = bytearray(f"P6\n{WIDTH} {HEIGHT}\n65535\n".encode())
    for red, green, blue in picture("RGB").get_flattened_data():
        for value in (red * 257, green * 257 + (17 if green < 255 else 0), blue * 257):
            values += value.to_bytes(2, "big")
    path.write_bytes(values)


def encode(source, name, *options):
    out = GOLDEN / "jxl" / f"{name}.jxl"
    subprocess.run(["cjxl", source, out, "--quiet", *options], check=True)
    return out


def decode(name):
    command = ["djxl", GOLDEN / "jxl" / f"{name}.jxl", GOLDEN / "jxl" / f"{name}.png", "--quiet"]
    subprocess.run(command, check=True)


def main():
    (GOLDEN / "jxl").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        for name, mode in [("lossless", "RGB"), ("alpha", "RGBA"), ("gray", "L")]:
            source = GOLDEN / "jxl" / f"{name}.png"
            picture(mode).save(source)
            encode(source, name, "--distance=0")
        # A profile that is not sRGB's.
        source = GOLDEN / "jxl/profile.png"
        picture("RGB").save(source, icc_profile=(GOLDEN / "adobe-rgb-free.icc").read_bytes())
        encode(source, "profile", "--distance=0")
        deep(work / "deep.ppm")
        encode(work / "deep.ppm", "deep", "--distance=0")
        decode("deep")
        encode(GOLDEN / "jxl/lossless.png", "lossy", "--distance=1")
        decode("lossy")
        # A JPEG that is kept bit by bit, turned by its EXIF.
        exif = Image.Exif()
        exif[0x0112] = 6
        picture("RGB").save(work / "turned.jpg", quality=90, exif=exif)
        encode(work / "turned.jpg", "turned", "--lossless_jpeg=1")
        decode("turned")


if __name__ == "__main__":
    main()
