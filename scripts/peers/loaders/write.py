"""Writes the samples that rectiflow packed in the format of each other engine; counts their bytes.

    python scripts/peers/loaders/write.py FOLDER

Reads FOLDER/rectiflow/train and test, writes FOLDER/ENGINE/train and test, each by the engine's own
documentation. Existing folders are kept; delete them to write them again.
"""

import importlib
import json
import pathlib
import shutil
import sys

import samples

ENGINES = ["mosaic", "litdata", "webdataset", "flowrider"]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    counts = {}
    for part in ["train", "test"]:
        buckets = samples.buckets(folder / "rectiflow" / part)
        for name in ENGINES:
            written = folder / name / part
            if written.exists():
                continue
            unfinished = folder / name / f"{part}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            importlib.import_module(f"engine_{name}").write(unfinished, buckets)
            unfinished.rename(written)
            print(f"wrote {written}", flush=True)
        all_samples = (sample for bucket in buckets for sample in bucket)
        counts[part] = {
            "samples": sum(bucket.rows for bucket in buckets),
            "buckets": len(buckets),
            "text_bytes": sum(len(sample["text"].encode()) for sample in all_samples),
        }
    (folder / "samples.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
