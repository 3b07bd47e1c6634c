"""A small run that many ranks can share, for the scripts beside this one: sixteen emoji, the tiny SDXL from random weights,
steps of four micro-batches of one sample, a checkpoint every five."""

import json
import pathlib
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PREP = """[prep]
area_px = 16384
step_px = 32
bucket_min_px = 64
bucket_max_px = 256
min_side_px = 32
test_count = 2
"""


class SmallRun:
    """A folder with a packed data set; recipes are written into it."""

    def __init__(self, folder, rectiflow):
        self.folder, self.rectiflow = pathlib.Path(folder), rectiflow
        pictures = self.folder / "pictures"
        pictures.mkdir()
        with tarfile.open(ROOT / "assets/emoji/emoji.tar") as tar:
            for member in [member for member in tar if member.name.endswith(".webp")][:16]:
                (pictures / member.name).write_bytes(tar.extractfile(member).read())
                (pictures / member.name).with_suffix(".txt").write_text("an emoji")
        (self.folder / "prep.toml").write_text(PREP)
        command = [
            rectiflow,
            "prep",
            pictures,
            "--out",
            self.folder / "dataset",
            "--recipe",
            self.folder / "prep.toml",
        ]
        subprocess.run(
            [*command, "--vae", ROOT / "assets/tiny-sdxl/vae"],
            check=True,
            stderr=subprocess.DEVNULL,
        )

    def recipe(self, name, steps, more=""):
        """A recipe of so many steps; its run folder is below the folder."""
        path = self.folder / f"{name}.toml"
        path.write_text(f"""[run]
dir = '{self.folder / name}'
seed = 7
[model]
base = '{ROOT / "assets/tiny-sdxl"}'
random = ['unet', 'text_encoder', 'text_encoder_2']
[[data]]
path = '{self.folder / "dataset"}'
[train]
samples = {4 * steps}
micro_batch = 1
micro_batches = 4
text_encoders = 'trained'
[lr]
warmup_samples = 0
peak = {1e-4}
[test]
every_steps = 1000
[checkpoint]
every_steps = 5
[preview]
every_steps = 1000
{more}""")
        return path

    def events(self, name, kind):
        """What rank 0 has written down of a kind."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                break  # it is being written
        return [event for event in events if event["event"] == kind]


def check(holds, what, found):
    """Says that something holds, or ends with what was found instead."""
    if not holds:
        sys.exit(f"FAILED: {what}\nfound: {found}")
    print(f"ok: {what}", flush=True)
