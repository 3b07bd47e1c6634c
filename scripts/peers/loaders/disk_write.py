"""Writes the samples that rectiflow packed in the format of each engine of disk_engines.py.

    python scripts/peers/loaders/disk_write.py FOLDER

Reads FOLDER/rectiflow/disk. Existing folders are kept; delete them to write them again.
"""

import pathlib
import shutil
import sys

import disk_engines
import samples


def main():
    folder = pathlib.Path(sys.argv[1])
    buckets = samples.buckets(folder / "rectiflow/disk")
    for engine in disk_engines.ENGINES.values():
        written = folder / engine.folder
        if written.exists():
            continue
        unfinished = folder / f"{engine.folder}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        engine.write(unfinished, buckets)
        unfinished.rename(written)
        print(f"wrote {written}", flush=True)


if __name__ == "__main__":
    main()
