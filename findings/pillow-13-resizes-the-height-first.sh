#!/usr/bin/env bash
# Pillow 13.0.0: Image.resize of an 8-bit picture begins with the height where the picture loses more
# than twice as many rows as columns. Pillow 12.0.0 always begins with the width. What is between the
# two passes is rounded to 8 bits, so the same file, filter and size have other pixels under the two
# versions: in a picture of noise, one value in five, by up to three levels. Inputs of a model that
# were prepared with one version are not those of the other. Where fewer rows are lost, they are.
#
# Needs python3 with venv, 15 MB to download. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/resize.py" <<'PY'
import sys

import PIL
from PIL import Image

# A picture of all 256 levels in no order, from a linear congruential generator.
WIDTH, HEIGHT = 96, 400
state, levels = 1, []
for _ in range(WIDTH * HEIGHT * 3):
    state = (state * 1103515245 + 12345) % 2**31
    levels.append(state >> 16 & 255)
picture = Image.frombytes("RGB", (WIDTH, HEIGHT), bytes(levels))
for size in [(64, 90), (64, 380)]:
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    path = f"{sys.argv[1]}-{size[1]}.bytes"
    open(path, "wb").write(resized.tobytes())
print("Pillow", PIL.__version__)
PY
for version in 12.0.0 13.0.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "pillow==$version"
    "$folder/$version/bin/python" "$folder/resize.py" "$folder/$version"
done
python3 - "$folder" <<'PY'
import sys

for height, name in [(90, "310 of 400 rows lost"), (380, "20 of 400 rows lost")]:
    old, new = (open(f"{sys.argv[1]}/{version}-{height}.bytes", "rb").read() for version in ("12.0.0", "13.0.0"))
    differences = [abs(a - b) for a, b in zip(old, new)]
    differ = sum(difference > 0 for difference in differences)
    print(f"96x400 to 64x{height}, {name}: {differ} of {len(old)} values differ, by at most {max(differences)}")
    if height == 90:
        assert differ > 1000 and max(differences) == 3
    else:
        assert differ == 0
PY
