"""The loaders that read a local disk, each set up as its own documentation says.

For each engine: `write` packs the samples, `batches` returns an iterator over one pass after the
other, of batches of one shape: ids and latents, stacked. Where an engine has no batches of one
shape, a sampler of one's own groups the samples, as its documentation allows.
"""

import io
import itertools
import json
import random
import tarfile

import numpy as np

BATCH = 16
SHARD_BYTES = 64_000_000


def mixed(buckets):
    """All samples in random order, each with the shape of its latent."""
    rng = random.Random(0)
    left = {bucket.name: bucket.rows for bucket in buckets}
    samples = {bucket.name: iter(bucket) for bucket in buckets}
    shapes = {bucket.name: bucket.shape for bucket in buckets}
    while left:
        (name,) = rng.choices(list(left), weights=left.values())
        yield shapes[name], next(samples[name])
        left[name] -= 1
        if not left[name]:
            del left[name]


def grouped(groups, rng):
    """Batches of one shape in random order; the last of each shape can be shorter."""
    batches = []
    for group in groups.values():
        members = rng.sample(group, len(group))
        batches += [members[at : at + BATCH] for at in range(0, len(members), BATCH)]
    rng.shuffle(batches)
    return batches


class Webshart:
    """webshart: tars of 64 MB with an index that has sizes and captions."""

    package = "webshart"
    folder = "webshart"

    @staticmethod
    def write(folder, buckets):
        folder.mkdir(parents=True)
        samples = mixed(buckets)
        for number in itertools.count():
            path = folder / f"samples-{number:05}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                index = Webshart.fill(tar, samples)
            if not index:
                path.unlink()
                return
            whole = {"filesize": path.stat().st_size, "files": index}
            path.with_suffix(".json").write_text(json.dumps(whole))

    @staticmethod
    def fill(tar, samples):
        """Adds samples until the tar is full; returns its index."""
        index = {}
        for (_, height, width), sample in samples:
            data = sample["latent"].tobytes()
            entry = tarfile.TarInfo(f"{sample['id']:09}.bin")
            entry.size = len(data)
            index[entry.name] = {
                "offset": tar.offset + 512,
                "length": len(data),
                "width": width,
                "height": height,
                "aspect": width / height,
                "captions": sample["text"],
            }
            tar.addfile(entry, io.BytesIO(data))
            if tar.offset > SHARD_BYTES:
                break
        return index

    @staticmethod
    def stacked(entries):
        """Ids and latents of a batch; latents of several shapes cannot be stacked."""
        ids = [int(entry.path.split(".")[0]) for entry in entries]
        shapes = {(4, entry.height, entry.width) for entry in entries}
        latents = [np.frombuffer(entry.data, np.float16) for entry in entries]
        if len(shapes) > 1:
            return ids, latents
        return ids, np.stack(latents).reshape(-1, *shapes.pop())


class WebshartBuckets(Webshart):
    """webshart's own loader for buckets, grouped by exact geometry."""

    name = "webshart, BucketDataLoader"

    def __init__(self, folder):
        import webshart

        dataset = webshart.discover_dataset(str(folder))
        self.loader = webshart.BucketDataLoader(dataset, key="geometry-tuple", batch_size=BATCH)

    def batches(self):
        self.loader.reset()
        for entries in self.loader.iter_batches():
            yield self.stacked(entries)


class WebshartSampler(Webshart):
    """webshart's `load_sample`, with a sampler of one's own over its list of buckets."""

    name = "webshart, load_sample"

    def __init__(self, folder):
        import webshart

        self.loader = webshart.TarDataLoader(webshart.discover_dataset(str(folder)))
        self.rng = random.Random(0)
        self.groups = {}
        shards = list(range(self.loader.num_shards))
        listed = self.loader.list_shard_sample_aspect_buckets(shards, key="geometry-tuple")
        for shard in listed:
            for key, entries in shard["buckets"].items():
                members = self.groups.setdefault(str(key), [])
                members += [(shard["shard_idx"], entry["sample_idx"]) for entry in entries]

    def batches(self):
        for members in grouped(self.groups, self.rng):
            yield self.stacked([self.loader.load_sample(*member) for member in members])


class Ferroload:
    """ferroload: its dataset format, its prefetching loader over batches of indices."""

    name = "ferroload"
    package = "ferroload"
    folder = "ferroload"

    @staticmethod
    def write(folder, buckets):
        import ferroload

        groups = {}
        writer = ferroload.Writer(str(folder), "latents")
        writer.declare("latent", "npy", "tensor", "npy")
        for number, (shape, sample) in enumerate(mixed(buckets)):
            file = io.BytesIO()
            np.save(file, sample["latent"])
            meta = {"id": sample["id"], "text": sample["text"]}
            writer.add(str(sample["id"]), {"latent": file.getvalue()}, meta)
            groups.setdefault(str(shape), []).append(number)
        writer.close()
        (folder / "groups.json").write_text(json.dumps(groups))

    def __init__(self, folder):
        import ferroload

        self.ferroload = ferroload
        self.groups = json.loads((folder / "groups.json").read_text())
        self.rng = random.Random(0)
        self.dataset = ferroload.FerroTorchDataset(
            ferroload.Dataset.open(str(folder)), arrays=["latent"], meta=["id", "text"]
        )

    def batches(self):
        loader = self.ferroload.PrefetchLoader(
            self.dataset, grouped(self.groups, self.rng), self.ferroload.numpy_collate
        )
        for batch in loader:
            yield [int(id) for id in batch["id"]], batch["latent"]


class DataloaderRs:
    """dataloader-rs: a file for each sample, a dataset of batches, two threads."""

    name = "dataloader-rs"
    package = "dataloader-rs"
    folder = "dataloader_rs"

    @staticmethod
    def write(folder, buckets):
        folder.mkdir(parents=True)
        groups, texts = {}, {}
        for shape, sample in mixed(buckets):
            np.save(folder / f"{sample['id']}.npy", sample["latent"])
            groups.setdefault(str(shape), []).append(sample["id"])
            texts[sample["id"]] = sample["text"]
        (folder / "groups.json").write_text(json.dumps(groups))
        (folder / "texts.json").write_text(json.dumps(texts))

    def __init__(self, folder):
        import dataloader_rs

        class Batches(dataloader_rs.PyDataset):
            """The batches of one pass: its loader has no batch sampler."""

            def __len__(dataset):
                return len(self.members)

            def __getitem__(dataset, number):
                ids = self.members[number]
                return ids, np.stack([np.load(folder / f"{id}.npy") for id in ids])

        self.groups = json.loads((folder / "groups.json").read_text())
        self.texts = json.loads((folder / "texts.json").read_text())
        self.rng = random.Random(0)
        self.members = grouped(self.groups, self.rng)
        self.loader = dataloader_rs.PyDataloader(
            Batches(), batch_size=1, num_workers=2, collate_fn=lambda batch: batch[0]
        )

    def batches(self):
        self.members = grouped(self.groups, self.rng)
        yield from self.loader


ENGINES = {
    "webshart_buckets": WebshartBuckets,
    "webshart_sampler": WebshartSampler,
    "ferroload": Ferroload,
    "dataloader_rs": DataloaderRs,
}


def passes(engine, folder, number):
    """Opens an engine and yields the batches of `number` passes, an iterator each."""
    reader = ENGINES[engine](folder)
    for _ in itertools.repeat(None, number):
        yield reader.batches()
