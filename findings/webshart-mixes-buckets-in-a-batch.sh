#!/usr/bin/env bash
# webshart 0.6.0: BucketDataLoader walks one bucket behind the other, and iter_batches() counts
# pictures on across the border between two. So a batch may hold pictures of two shapes, which
# cannot be stacked, unless every bucket's size is a multiple of the batch size. Ten pictures of two
# shapes, five of each, in batches of four: the second batch is mixed, with either strategy that
# keeps buckets.
#
# Needs Python 3.12 or newer with venv, as python3 or by its name in PYTHON. Exits with 0 if seen
# again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    webshart==0.6.0 tqdm==4.70.1 pillow==13.0.0

"$folder/env/bin/python" - "$folder/set" <<'PY'
import importlib.metadata
import io
import pathlib
import sys
import tarfile

import webshart
from PIL import Image

dataset = pathlib.Path(sys.argv[1])
dataset.mkdir()
with tarfile.open(dataset / "set.tar", "w") as tar:
    for index in range(10):
        data = io.BytesIO()
        Image.new("RGB", (64, 128) if index % 2 else (128, 64), (20 * index, 0, 0)).save(data, "PNG")
        member = tarfile.TarInfo(f"{index}.png")
        member.size = data.tell()
        tar.addfile(member, io.BytesIO(data.getvalue()))
webshart.MetadataExtractor().extract_metadata(
    source=str(dataset), destination=str(dataset), max_workers=1, include_image_geometry=True
)
print("webshart", importlib.metadata.version("webshart"))
for strategy in ["sequential", "random_within_buckets"]:
    loader = webshart.BucketDataLoader(
        str(dataset), key="geometry-tuple", batch_size=4, sampling_strategy=strategy
    )
    batches = []
    for batch in loader.iter_batches():
        batches.append([Image.open(io.BytesIO(entry.data)).size for entry in batch])
        print(strategy, batches[-1])
    assert [len(batch) for batch in batches] == [4, 4, 2], batches
    assert [len(set(batch)) for batch in batches] == [1, 2, 1], batches
PY
