"""LitData: one StreamingDataset per bucket, combined `per_stream`.

Its README calls that mode "useful when shapes/dtypes differ". Chunks of 64 MB as in its README, its
own shuffle, its cache on disk, its own DataLoader. `drop_last` is on for training and off for the
test set, as in its README. Its S3 client refuses endpoints without TLS and LitData has no option to
allow them, so the setting is put into its internal table.
"""

import os

from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset
from litdata.streaming import Cache, downloader


def write(folder, buckets):
    for bucket in buckets:
        (folder / bucket.name).mkdir(parents=True)
        cache = Cache(str(folder / bucket.name), chunk_bytes="64MB")
        for index, sample in enumerate(bucket):
            cache[index] = sample
        cache.done()
        cache.merge()


def batches(place, training):
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    datasets = [
        StreamingDataset(
            f"{place.s3}/{name}",
            cache_dir=f"{place.cache}/{name}",
            shuffle=training,
            drop_last=training,
            storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        )
        for name in place.buckets
    ]
    combined = CombinedStreamingDataset(datasets, batching_method="per_stream")
    return StreamingDataLoader(combined, batch_size=place.batch, num_workers=place.workers)
