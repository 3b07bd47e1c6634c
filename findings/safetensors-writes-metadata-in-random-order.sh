#!/usr/bin/env bash
# safetensors 0.8.0: saving the same tensors with the same metadata of two or more entries writes
# different bytes in different calls. The entries come from a hash map, so their order in the header
# varies; the tensors' bytes behind it are equal. A hash of the file is no identity of a model: hash
# what lies behind the header.
#
# Needs python3 with venv. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

"$folder/env/bin/python" - <<'PY'
import importlib.metadata

import numpy
from safetensors.numpy import save

tensors = {"weight": numpy.arange(6, dtype=numpy.float32)}
metadata = {"format": "pt", "modelspec.title": "a model"}
files = {save(tensors, metadata=metadata) for _ in range(64)}
print("safetensors", importlib.metadata.version("safetensors"), "-", len(files), "files of one model in 64 calls")
bodies = {file[8 + int.from_bytes(file[:8], "little"):] for file in files}
assert len(files) == 2, len(files)
assert len(bodies) == 1
one = {save(tensors, metadata={"format": "pt"}) for _ in range(64)}
assert len(one) == 1, "a single entry has one order"
PY
