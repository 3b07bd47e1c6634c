"""MosaicML Streaming: one stream per bucket and batches of one stream.

This follows its page on batching methods. All else is its default: raw shards of 64 MiB, the
shuffle py1e over the whole of each stream, 8 batches ahead, an unlimited cache on disk.
"""

from streaming import MDSWriter, Stream, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader


def write(folder, buckets):
    for bucket in buckets:
        shape = ",".join(map(str, bucket.shape))
        columns = {"id": "int", "latent": f"ndarray:float16:{shape}", "text": "str"}
        with MDSWriter(out=str(folder / bucket.name), columns=columns) as out:
            for sample in bucket:
                out.write(sample)


def batches(place, training):
    # The shared memory of killed runs would be mistaken for this run's.
    clean_stale_shared_memory()
    streams = [
        Stream(remote=f"{place.s3}/{name}", local=f"{place.cache}/{name}") for name in place.buckets
    ]
    dataset = StreamingDataset(
        streams=streams,
        batch_size=place.batch,
        shuffle=training,
        batching_method=place.method or "per_stream",
    )
    return DataLoader(dataset, batch_size=place.batch, num_workers=place.workers)
