#!/usr/bin/env python3
"""Pack the demo's base model: python3 scripts/pack_tiny_base.py EXPORT CHECKPOINT OUT.tar.gz

EXPORT is what `rectiflow export --format diffusers --dtype fp16` made of CHECKPOINT. Left out are the VAE, which lies
beside the archive, and the tokenizers, which the program has. Nearly all of the 49,408 token embeddings were never in a
caption: their rows still hold their random start, and are set to zero, so that the archive is a third as large. They
are found by the optimiser's memory, which is zero where no gradient ever came. The same input gives the same bytes.
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
    """The header as an object, as bytes with its length before it, and the tensors' bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[: 8 + length], bytearray(data[8 + length :])


def untouched_rows(checkpoint):
    """For each text encoder the token ids whose embeddings never had a gradient."""
    header, _, data = read_safetensors(checkpoint / "optimizer.safetensors")
    begin, end = header["mean_square"]["data_offsets"]
    mean_square = memoryview(data)[begin:end].cast("f")
    found, start = {}, 0
    for name, shape in json.loads((checkpoint / "state.json").read_text())["layout"]:
        component, _, tensor = name.partition(".")
        if tensor == EMBEDDING:
            num_rows, width = shape
            row = lambda index: mean_square[start + index * width : start + (index + 1) * width]
            found[component] = [index for index in range(num_rows) if not any(row(index))]
        start += math.prod(shape)
    return found


def without_rows(path, rows):
    """The file with these rows of its token embeddings set to zero."""
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


def main(export, checkpoint, out):
    untouched = untouched_rows(checkpoint)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(path for path in export.rglob("*") if path.is_file()):
            name = path.relative_to(export).as_posix()
            if name.startswith(LEFT_OUT):
                continue
            component = name.split("/")[0]
            is_encoder = component in untouched and name.endswith(".safetensors")
            content = without_rows(path, untouched[component]) if is_encoder else path.read_bytes()
            if is_encoder:
                print(
                    f"{component}: {len(untouched[component])} token embeddings were never used: zeros"
                )
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    with (
        open(out, "wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=9, mtime=0) as packed,
    ):
        packed.write(raw.getvalue())
    print(f"{out}: {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
