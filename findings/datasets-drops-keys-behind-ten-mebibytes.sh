#!/usr/bin/env bash
# datasets 5.2.0: `imagefolder` reads metadata.jsonl in chunks of 10 MiB and takes the columns from
# the first chunk alone. A key whose first line lies behind it (tags that only the later pictures
# have) is dropped: the column is missing, with no error and no warning. The same lines in a file
# below 10 MiB keep it. Here captions of 6,000 or of 60 characters, and tags for the last 100 of
# 2,000 pictures.
#
# Needs python3 with venv. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    datasets==5.2.0 pillow==13.0.0 numpy==2.4.6 pyarrow==26.0.1 pandas==3.1.1 huggingface_hub==2.4.0 dill==0.4.1 \
    multiprocess==0.70.19 fsspec==2026.9.0 xxhash==4.1.0

HF_HOME="$folder/home" "$folder/env/bin/python" - "$folder" <<'PY'
import json
import pathlib
import sys

import datasets
from PIL import Image

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
found = {}
for length in (60, 6000):
    folder = pathlib.Path(sys.argv[1]) / f"captions-{length}"
    folder.mkdir()
    lines = []
    for index in range(2000):
        name = f"{index:05}.png"
        Image.new("RGB", (2, 2)).save(folder / name)
        line = {"file_name": name, "text": "x" * length}
        if index >= 1900:
            line["tags"] = "fox, snow"
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    size = (folder / "metadata.jsonl").stat().st_size
    print(f"metadata.jsonl of {size} bytes: {len(rows)} rows with {rows.column_names}")
    found[length] = rows.column_names
assert found[60] == ["image", "text", "tags"], found
assert found[6000] == ["image", "text"], found
PY
