#!/usr/bin/env bash
# webdataset 1.0.2: a sample is a run of neighbouring members with one key. In a tar with all
# pictures first and all texts behind them (what `tar c *.jpg *.txt` writes) every picture comes as
# a sample without its text and every text as a sample without its picture: twice the samples, no
# pair among them, no error and no warning.
#
# Needs python3 with venv. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    webdataset==1.0.2 braceexpand==0.1.7 numpy==2.4.6 PyYAML==6.0.3

cd "$folder"
for name in fox owl hare; do
    printf 'picture of %s' "$name" >"$name.jpg"
    printf 'a %s in the snow' "$name" >"$name.txt"
done
tar cf set.tar -- *.jpg *.txt
"$folder/env/bin/python" - <<'PY'
import importlib.metadata

import webdataset

samples = list(webdataset.WebDataset("set.tar", shardshuffle=False))
print("webdataset", importlib.metadata.version("webdataset"))
for sample in samples:
    print(sample["__key__"], sorted(key for key in sample if not key.startswith("__")))
assert len(samples) == 6, len(samples)
assert not any("jpg" in sample and "txt" in sample for sample in samples)
PY
