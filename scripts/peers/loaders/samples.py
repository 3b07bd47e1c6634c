"""The samples of a data set that rectiflow packed, by bucket, for the other engines to pack."""

import json
import pathlib

import pyarrow.parquet
import safetensors


class Bucket:
    """All samples of one size: their number, the shape of a latent, and an iterator over them."""

    def __init__(self, name):
        self.name = name
        self.objects = []
        self.rows = 0
        self.shape = None

    def add(self, latents, text, rows):
        with safetensors.safe_open(latents, "numpy") as file:
            self.shape = tuple(file.get_slice("latents").get_shape()[1:])
        self.objects.append((latents, text))
        self.rows += rows

    def __iter__(self):
        """Yields each sample: id, latent (float16), and the text row as one string of JSON."""
        for latents, text in self.objects:
            rows = pyarrow.parquet.read_table(text).to_pylist()
            with safetensors.safe_open(latents, "numpy") as file:
                tensor = file.get_slice("latents")
                for index, row in enumerate(rows):
                    yield {"id": row["id"], "latent": tensor[index], "text": json.dumps(row)}


def buckets(root):
    """The buckets of a packed data set that has one split."""
    root = pathlib.Path(root)
    manifest = json.loads((root / "manifest.json").read_text())
    found = {}
    for entry in manifest["objects"]:
        size = manifest["buckets"][entry["bucket"]]
        name = f"{size['width_px']}x{size['height_px']}"
        bucket = found.setdefault(name, Bucket(name))
        bucket.add(root / entry["latents"], root / entry["text"], entry["rows"])
    return [found[name] for name in sorted(found)]
