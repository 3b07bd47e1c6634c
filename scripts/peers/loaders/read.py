"""One run of one engine in a process of its own, started by compare.py; prints one JSON object.

    python scripts/peers/loaders/read.py ENGINE train|test FOLDER URL CACHE --workers N --secs S

FOLDER is what the engine wrote, URL its address on the server. Reads one pass, or for at most S
seconds. The clock starts after the imports and includes everything an engine does from then on.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
import time
import traceback


class Reading:
    """Counts of what a loader delivers."""

    def __init__(self):
        self.began = time.perf_counter()
        self.ids = []
        self.sizes = []
        self.shapes = set()
        self.latent_bytes = 0
        self.first_secs = None
        self.first_samples = 0
        self.whole_pass = False
        self.error = None

    def secs(self):
        return time.perf_counter() - self.began

    def add(self, batch):
        latent = batch["latent"]
        self.latent_bytes += latent.numel() * latent.element_size()
        self.sizes.append(len(latent))
        self.ids.extend(batch["id"].tolist())
        self.shapes.add(tuple(latent.shape[1:]))
        if self.first_secs is None:
            self.first_secs, self.first_samples = self.secs(), len(self.ids)

    def result(self):
        secs = self.secs()
        after_first = len(self.ids) - self.first_samples
        largest = max(self.sizes, default=0)
        return {
            "first_batch_secs": self.first_secs,
            "secs": secs,
            "samples": len(self.ids),
            "distinct": len(set(self.ids)),
            "batches": len(self.sizes),
            "full_batches": sum(size == largest for size in self.sizes),
            "shapes": len(self.shapes),
            "latent_bytes": self.latent_bytes,
            "whole_pass": self.whole_pass,
            "error": self.error,
            "samples_per_sec": len(self.ids) / secs,
            "samples_per_sec_after_first": (
                after_first / (secs - self.first_secs) if after_first else None
            ),
        }


def message(cause):
    """The kind of an exception and the last line of its text."""
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1].strip() if lines else ''}"


def read(loader_of, secs):
    """Reads to the end of the pass or for at most `secs`; an engine's error ends it too."""
    reading = Reading()
    try:
        for batch in loader_of():
            reading.add(batch)
            if reading.secs() > secs:
                break
        else:
            reading.whole_pass = True
    except BaseException as cause:
        traceback.print_exc()
        reading.error = message(cause)
    return reading.result()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("engine")
    parser.add_argument("part", choices=["train", "test"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("url", help="http://HOST:PORT/BUCKET/PART")
    parser.add_argument("cache", type=pathlib.Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--secs", type=float, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--method", help="MosaicML Streaming's batching method")
    args = parser.parse_args()
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    engine = importlib.import_module(f"engine_{args.engine}")
    host, _, place = args.url.removeprefix("http://").partition("/")
    os.environ["AWS_ENDPOINT_URL"] = os.environ["S3_ENDPOINT_URL"] = f"http://{host}"
    args.http, args.s3 = args.url, f"s3://{place}"
    args.buckets = sorted(path.name for path in args.folder.iterdir() if path.is_dir())
    result = read(lambda: engine.batches(args, args.part == "train"), args.secs)
    print(json.dumps(result), flush=True)
    # Not waiting for workers and threads: they are not part of the measurement.
    os._exit(0)


if __name__ == "__main__":
    main()
