"""flowrider: one stream per bucket, as in its author's trainer; it has no other documentation.

One object per sample, its default of 8 concurrent downloads and 6 samples ahead per worker, a cache
on disk. `drop_last` is on for training and off for the test set. With it off flowrider fills
batches with the index -1, which it cannot look up; the subclass that it requires returns None for
it, and the batch consists of the other samples.
"""

import flowrider
import torch
from torch.utils.data import default_collate


def write(folder, buckets):
    columns = {
        "id": flowrider.ColumnEncoding.Int64,
        "latent": flowrider.ColumnEncoding.Bytes,
        "text": flowrider.ColumnEncoding.Str,
        "height": flowrider.ColumnEncoding.Int32,
    }
    for bucket in buckets:
        out = flowrider.SampleWriter(str(folder / bucket.name), False, columns, 2)
        for sample in bucket:
            out.write({**sample, "latent": sample["latent"].tobytes(), "height": bucket.shape[1]})
        out.finish()


class Dataset(flowrider.StreamingDataset):
    def __getitem__(self, index):
        if index < 0:
            return None
        sample = self.get_sample(index)
        latent = torch.frombuffer(bytearray(sample["latent"]), dtype=torch.float16)
        latent = latent.view(4, int(sample["height"]), -1)
        return {"id": int(sample["id"]), "latent": latent, "text": sample["text"]}


def collate(samples):
    return default_collate([sample for sample in samples if sample is not None])


def batches(place, training):
    dataset = Dataset(
        [(f"{place.s3}/{name}", name) for name in place.buckets],
        flowrider.Config(str(place.cache)),
        seed=0,
        shuffle=training,
        drop_last=training,
        micro_batch_size=place.batch,
    )
    return flowrider.StreamingDataLoader(
        dataset=dataset, num_workers=place.workers, collate_fn=collate
    )
