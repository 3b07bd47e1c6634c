"""WebDataset: shards of mixed samples, and a stage of the pipeline that makes batches of one shape.

That stage is its author's answer to the question for such batches (webdataset#359), except that the
rest of each size, which the answer drops, follows at the end. Samples are written to shards of 64
MB in random order and read with curl over HTTP; `shuffle(1000)` is from its README; no cache is its
default.
"""

import json
import random

import torch
import webdataset
from torch.utils.data import default_collate

SHARD_BYTES = 64_000_000


def write(folder, buckets):
    folder.mkdir(parents=True)
    rng = random.Random(0)
    left = {bucket.name: bucket.rows for bucket in buckets}
    samples = {bucket.name: iter(bucket) for bucket in buckets}
    pattern = str(folder / "samples-%05d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=1 << 30, verbose=0) as out:
        while left:
            (name,) = rng.choices(list(left), weights=left.values())
            sample = next(samples[name])
            text = json.loads(sample["text"])
            key = f"{sample['id']:09}"
            out.write({"__key__": key, "latent.npy": sample["latent"], "text.json": text})
            left[name] -= 1
            if not left[name]:
                del left[name]
    shards = sorted(path.name for path in folder.glob("*.tar"))
    (folder / "shards.json").write_text(json.dumps(shards))


class BatchesOfOneShape:
    """A pipeline stage: collects samples by shape and yields full batches, then the rests."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, samples):
        waiting = {}
        for sample in samples:
            latent = torch.from_numpy(sample["latent.npy"])
            text = json.dumps(sample["text.json"])
            same = waiting.setdefault(latent.shape, [])
            same.append({"id": int(sample["__key__"]), "latent": latent, "text": text})
            if len(same) == self.batch:
                yield default_collate(same)
                same.clear()
        yield from (default_collate(rest) for rest in waiting.values() if rest)


def batches(place, training):
    shards = json.loads((place.folder / "shards.json").read_text())
    dataset = webdataset.WebDataset(
        [f"{place.http}/{shard}" for shard in shards], shardshuffle=100 if training else False
    )
    if training:
        dataset = dataset.shuffle(1000)
    dataset = dataset.decode().compose(BatchesOfOneShape(place.batch))
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=place.workers)
