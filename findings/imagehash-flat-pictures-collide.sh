#!/usr/bin/env bash
# ImageHash 4.3.2: the perceptual hash (DCT) of every flat picture but black is the same,
# 8000000000000000: grey, white and any single colour are "near-duplicates" at distance 0 and black
# one bit away, however different they look. Faint lines that vanish in its 32x32 reduction do not
# change it either. Removing near-duplicates by this hash alone drops all but one of the plain
# backgrounds of a data set.
#
# Needs python3 with venv. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    ImageHash==4.3.2 PyWavelets==1.9.0 numpy==2.4.6 scipy==1.17.1 pillow==13.0.0

"$folder/env/bin/python" - <<'PY'
import importlib.metadata

import imagehash
import numpy
from PIL import Image

hashes = {}
for name, colour in [("black", (0, 0, 0)), ("grey", (128, 128, 128)), ("white", (255, 255, 255)), ("red", (200, 0, 0))]:
    hashes[name] = imagehash.phash(Image.new("RGB", (256, 256), colour))
faint = numpy.full((256, 256), 128, numpy.uint8)
faint[::32] += 2
hashes["grey with faint lines"] = imagehash.phash(Image.fromarray(faint))
print("ImageHash", importlib.metadata.version("ImageHash"))
for name, value in hashes.items():
    print(value, name)
assert hashes["grey"] == hashes["white"] == hashes["red"] == hashes["grey with faint lines"], hashes
assert hashes["black"] - hashes["white"] == 1, hashes["black"]
PY
