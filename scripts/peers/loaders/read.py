"""One run of one engine in a process of its own, as compare.py starts it; prints one JSON object.

    python scripts/peers/loaders/read.py ENGINE train|test FOLDER URL CACHE --workers N --secs S

FOLDER is what the engine wrote, URL where the server has it. Reads one pass, or for as many seconds as allowed. The clock
starts when the libraries are imported: what an engine does from then on counts.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
import time
import traceback


def read(loader_of, secs):
    began = time.perf_counter()
    ids, shapes, first_secs, first_samples, latent_bytes = [], set(), None, 0, 0
    sizes, whole, error = [], False, None
    try:
        for batch in loader_of():
            latent = batch["latent"]
            latent_bytes += latent.numel() * latent.element_size()
            sizes.append(len(latent))
            ids.extend(batch["id"].tolist())
            shapes.add(tuple(latent.shape[1:]))
            now = time.perf_counter() - began
            if first_secs is None:
                first_secs, first_samples = now, len(ids)
            if now > secs:
                break
        else:
            whole = True
    except BaseException as cause:
        traceback.print_exc()
        last = [line for line in str(cause).strip().splitlines() if line.strip()]
        error = f"{type(cause).__name__}: {last[-1].strip() if last else ''}"
    total = time.perf_counter() - began
    after_first = len(ids) - first_samples
    return {
        "first_batch_secs": first_secs,
        "secs": total,
        "samples": len(ids),
        "distinct": len(set(ids)),
        "batches": len(sizes),
        "full_batches": sum(size == max(sizes) for size in sizes) if sizes else 0,
        "shapes": len(shapes),
        "latent_bytes": latent_bytes,
        "whole_pass": whole,
        "error": error,
        "samples_per_sec": len(ids) / total,
        "samples_per_sec_after_first": after_first / (total - first_secs) if after_first else None,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    # Workers and threads that are still at it are no part of what was measured.
    os._exit(0)


if __name__ == "__main__":
    main()
