#!/usr/bin/env python3
"""Packs the demo's base model: python3 scripts/pack_tiny_base.py EXPORT CHECKPOINT OUT.tar.gz

EXPORT is the result of `rectiflow export --format diffusers --dtype fp16` on CHECKPOINT. Left out
are the VAE, which lies beside the archive, and the tokenizers, which the program contains. Captions
use few of the 49,408 token embeddings. The rows of the others still hold their random start and
are set to zero here, which makes the archive a third as large. Unused rows are those whose second
moment in the optimiser is zero. The same input always produces the same bytes.
"""

import gzip
import io
import json
import math
import struct
import sys
import tarfile
from pathlib import Path

EMBEDDING = "text_model.embeddings.token_embedding.weight"
LEFT_OUT = ("vae/", "tokenizer/", "tokenizer_2/", "README.md")


def read_safetensors(path):
    """The header as an object, the header as bytes with its length prefix, the tensors' bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[: 8 + length], bytearray(data[8 + length :])


def untouched_rows(checkpoint):
    """For each text encoder the token ids whose embeddings never received a gradient."""
    header, _, data = read_safetensors(checkpoint / "optimizer.safetensors")
    begin, end = header["mean_square"]["data_offsets"]
    mean_square = memoryview(data)[begin:end].cast("f")
    found, start = {}, 0
    for name, shape in json.loads((checkpoint / "state.json").read_text())["layout"]:
        component, _, tensor = name.partition(".")
        if tensor == EMBEDDING:
            found[component] = zero_rows(mean_square[start : start + math.prod(shape)], *shape)
        start += math.prod(shape)
    return found


def zero_rows(matrix, num_rows, width):
    """The indices of the rows that are zero, in a matrix given as one flat view."""
    return [
        index for index in range(num_rows) if not any(matrix[index * width : (index + 1) * width])
    ]


def without_rows(path, rows):
    """The bytes of the file with these rows of its token embeddings set to zero."""
    header, head, data = read_safetensors(path)
    entry = header[EMBEDDING]
    if entry["dtype"] != "F16":
        sys.exit(
            f"{path}: expected fp16 embeddings, found {entry['dtype']}; export with --dtype fp16"
        )
    begin, row_bytes = entry["data_offsets"][0], 2 * entry["shape"][1]
    for index in rows:
        data[begin + index * row_bytes : begin + (index + 1) * row_bytes] = bytes(row_bytes)
    return head + bytes(data)


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    export, checkpoint, out = map(Path, sys.argv[1:])
    untouched = untouched_rows(checkpoint)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(path for path in export.rglob("*") if path.is_file()):
            name = path.relative_to(export).as_posix()
            if name.startswith(LEFT_OUT):
                continue
            component = name.split("/")[0]
            if component in untouched and name.endswith(".safetensors"):
                content = without_rows(path, untouched[component])
                num_zeros = len(untouched[component])
                print(f"{component}: {num_zeros} token embeddings were never used: set to zero")
            else:
                content = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    with (
        open(out, "wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=9, mtime=0) as packed,
    ):
        packed.write(raw.getvalue())
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
