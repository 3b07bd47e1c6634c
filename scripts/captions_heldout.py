#!/usr/bin/env python3
"""Writes the captions of a table beside links to their pictures: for scripts/captions_use.sh.

    python3 scripts/captions_heldout.py PICTURES TABLE.jsonl OUT

OUT receives links to the pictures that have a row and a metadata.jsonl with its text as their
caption, as crates/rectiflow-train/examples/demo_measure reads them.
"""

import json
import os
import pathlib
import sys


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    pictures, table, out = map(pathlib.Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    lines = []
    for row in sorted(rows, key=lambda row: row["source"]):
        name = row["source"]
        if not (out / name).exists():
            os.link(pictures / name, out / name)
        lines.append(json.dumps({"file_name": name, "captions": [row["text"]]}))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
