"""The error of decoding a JPEG at half its size, before a resize that is exact.

    PYTHONPATH=scripts/peers VENV/bin/python scripts/peers/prep/half_scale.py FOLDER

Draws a scene of 24 megapixels of pictures.py into FOLDER, decodes it with libjpeg-turbo at 1/2 (an
inverse transform of 4 x 4 of the 8 x 8 coefficients), resizes both to 1248x832 by Lanczos in
float64, and prints the mean and the largest difference in units of 1/255, before and after the
rounding to 8 bits. Four minutes.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

import compare
import pictures

SIDES = (6000, 4000)
HALF = (3000, 2000)
TARGET = (1248, 832)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = pathlib.Path(sys.argv[1]) / "half-scale.jpg"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.scene(0, *SIDES).save(path, **pictures.OPTIONS["jpeg"])
    expected = compare.reference(path, TARGET)
    image = Image.open(path)
    image.draft("RGB", HALF)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    if pixels.shape[:2] != HALF[::-1]:
        sys.exit(f"{path}: decoded to {pixels.shape[1]}x{pixels.shape[0]}, not {HALF}")
    down = compare.weights(HALF[1], TARGET[1])
    across = compare.weights(HALF[0], TARGET[0])
    channels = [down @ pixels[..., channel] @ across.T for channel in range(3)]
    found = np.clip(np.stack(channels, axis=-1), 0, 255)
    for name, values in [("exact", found), ("8 bits", np.rint(found))]:
        difference = np.abs(values - expected)
        print(f"{name}: mean {difference.mean():.3f}, largest {difference.max():.1f}")


if __name__ == "__main__":
    main()
