#!/usr/bin/env bash
# Pillow 13.0.0: a PNG of 16-bit grey opens as mode I;16, and convert("RGB") or convert("L") clips
# its values at 255 instead of scaling them: whatever is brighter than 1/257 of white becomes white.
# The same values in a PNG of 16-bit RGB are scaled when it is opened. No error and no warning; a
# loader that calls convert("RGB") hands white pictures to the training.
#
# Needs python3 with venv. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0

"$folder/env/bin/python" - <<'PY'
import io
import struct
import zlib

import PIL
from PIL import Image

VALUES = [0, 128, 256, 16384, 32768, 65535]
GREY, RGB = 0, 2


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(colour):
    """A PNG of one row, 16 bits a channel."""
    repeats = 1 if colour == GREY else 3
    row = b"\0" + b"".join(struct.pack(">H", value) * repeats for value in VALUES)
    head = struct.pack(">IIBBBBB", len(VALUES), 1, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + body))


print("Pillow", PIL.__version__)
print("values of 16 bits", VALUES)
found = {}
for name, colour in (("grey", GREY), ("RGB", RGB)):
    picture = png(colour)
    found[name] = list(picture.convert("RGB").tobytes()[::3])
    print(f"16-bit {name}, mode {picture.mode}, as RGB: {found[name]}")
assert found["RGB"] == [value >> 8 for value in VALUES], found
assert found["grey"] == [min(value, 255) for value in VALUES], found
assert list(png(GREY).convert("L").tobytes()) == found["grey"]
PY
