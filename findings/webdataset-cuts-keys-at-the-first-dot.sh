#!/usr/bin/env bash
# webdataset 1.0.2: the key of a tar member ends at the first dot of its file name. Pictures called
# `a_0.5.jpg` and `a_0.7.jpg` (a score or a version in the name) become one sample with the fields
# `5.jpg` and `7.jpg`, and a reader that asks for `jpg` finds no picture in it. No error, no warning.
#
# Needs python3 with venv. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    webdataset==1.0.2 braceexpand==0.1.7 numpy==2.4.6 PyYAML==6.0.3

cd "$folder"
"$folder/env/bin/python" - <<'PY'
import importlib.metadata
import io
import tarfile

import webdataset

with tarfile.open("set.tar", "w") as tar:
    for name, data in [("a_0.5.jpg", b"first"), ("a_0.5.txt", b"a fox"), ("a_0.7.jpg", b"second"), ("a_0.7.txt", b"an owl")]:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

samples = list(webdataset.WebDataset("set.tar", shardshuffle=False))
print("webdataset", importlib.metadata.version("webdataset"))
for sample in samples:
    print(sample["__key__"], sorted(key for key in sample if not key.startswith("__")))
assert len(samples) == 1 and samples[0]["__key__"] == "a_0", samples
assert "jpg" not in samples[0] and {"5.jpg", "7.jpg", "5.txt", "7.txt"} <= samples[0].keys()
PY
