#!/usr/bin/env python3
"""Rebuilds assets/clip/merges.txt.gz: the byte-pair merges of both of SDXL's tokenizers.

Source: open_clip/bpe_simple_vocab_16e6.txt.gz of the PyPI package open-clip-torch 3.3.0 (MIT; its
tokenizer.py: "Originally MIT License, Copyright (c) 2021 OpenAI"). CLIP uses lines 2..48895 of the
262,145 lines; they are kept unchanged.

    pip download --no-deps open-clip-torch==3.3.0
    python3 scripts/clip_merges.py open_clip_torch-3.3.0-py3-none-any.whl
"""

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path

MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
LICENSE = "open_clip_torch-3.3.0.dist-info/licenses/LICENSE"
SOURCE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# Of the uncompressed merges: compressed bytes may differ between versions of zlib.
MERGES_SHA256 = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
FOLDER = Path(__file__).parent.parent / "assets" / "clip"
NOTICE = b"""merges.txt.gz is from open-clip-torch 3.3.0, where it is marked
"Originally MIT License, Copyright (c) 2021 OpenAI". The licence of that package:

"""


def check(what, data, expected):
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        sys.exit(
            f"{what}: expected sha256 {expected}, found {found}; "
            "use open-clip-torch 3.3.0 from PyPI"
        )


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        source, license_text = wheel.read(MEMBER), wheel.read(LICENSE)
    check(MEMBER, source, SOURCE_SHA256)
    merges = b"".join(line + b"\n" for line in gzip.decompress(source).split(b"\n")[1:48895])
    check("merges", merges, MERGES_SHA256)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "merges.txt.gz").write_bytes(gzip.compress(merges, compresslevel=9, mtime=0))
    (FOLDER / "LICENSE").write_bytes(NOTICE + license_text)


if __name__ == "__main__":
    main()
