#!/usr/bin/env python3
"""Writes small pictures and profiles by other programs' encoders, for the tests of the decoders.

    python3 scripts/golden/pictures.py crates/rectiflow-data/tests/golden

Every picture is 64x48 pixels of one formula. Made with pillow 13.0.0, pillow-jxl-plugin 1.3.8 and,
for JPEG XL with a profile, cjxl 0.7 (Debian's package libjxl-tools). The folder holds two more
profiles, of Debian's package icc-profiles-free 2.0.1: sRGB.icc
as srgb-free.icc, and compatibleWithAdobeRGB1998.icc as adobe-rgb-free.icc (zlib licence).
"""

import pathlib
import subprocess
import sys
import tempfile

from PIL import Image, ImageCms

WIDTH, HEIGHT = 64, 48


def picture():
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for y in range(HEIGHT):
        for x in range(WIDTH):
            image.putpixel((x, y), (x * 4, y * 5, 255 - x * 2 - y * 2))
    return image


def by_cjxl(image, profile, distance, path):
    """Writes JPEG XL with a profile, which the plugin leaves out."""
    with tempfile.NamedTemporaryFile(suffix=".png") as png:
        image.save(png.name, icc_profile=profile)
        subprocess.run(["cjxl", "--quiet", "-d", str(distance), png.name, path], check=True)


def main():
    # Registers JPEG XL with Pillow.
    import pillow_jxl  # noqa: F401

    folder = pathlib.Path(sys.argv[1])
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (folder / "srgb-pillow.icc").write_bytes(srgb)
    adobe = (folder / "adobe-rgb-free.icc").read_bytes()

    image = picture()
    image.save(folder / "lossy.jxl", quality=95)
    image.save(folder / "lossless.jxl", lossless=True)
    by_cjxl(image, adobe, 0, folder / "lossless-adobe.jxl")
    by_cjxl(image, adobe, 0.3, folder / "lossy-adobe.jxl")
    image.convert("L").save(folder / "gray.jxl", lossless=True)
    # Opaque at the left, transparent at the right.
    alpha = Image.linear_gradient("L").rotate(-90).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    image.putalpha(alpha)
    image.save(folder / "alpha.jxl", lossless=True)
    picture().save(folder / "plain.avif", quality=90)


if __name__ == "__main__":
    main()
