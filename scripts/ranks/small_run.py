"""A small run for several ranks, shared by restarts.py, slurm.py and two_nodes.py.

Sixteen emoji, the tiny SDXL from random weights, steps of four micro-batches of one sample, and a
checkpoint every five steps.
"""

import json
import pathlib
import subprocess
import sys
import tarfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_PICTURES = 16
PREP = """[prep]
area_px = 16384
step_px = 32
bucket_min_px = 64
bucket_max_px = 256
min_side_px = 32
test_count = 2
"""


class SmallRun:
    """A folder with a packed data set, recipes and run folders."""

    def __init__(self, folder, rectiflow):
        self.folder, self.rectiflow = pathlib.Path(folder), rectiflow
        pictures = self.folder / "pictures"
        pictures.mkdir()
        unpack_pictures(pictures)
        recipe = self.folder / "prep.toml"
        recipe.write_text(PREP)
        command = [rectiflow, "prep", pictures, "--out", self.folder / "dataset"]
        command += ["--recipe", recipe, "--vae", ROOT / "assets/tiny-sdxl/vae"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def recipe(self, name, steps, more=""):
        """Writes a recipe of `steps` steps with the run folder `name`; returns its path."""
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
        """Rank 0's events of a kind."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                # The last line may be half written.
                break
        return [event for event in events if event["event"] == kind]

    def wait_for_steps(self, name, count, processes, patience_secs):
        """Waits until the run has taken `count` steps, a process has ended, or time is up."""
        end = time.monotonic() + patience_secs
        while time.monotonic() < end and all(process.poll() is None for process in processes):
            if len(self.events(name, "step")) >= count:
                return
            time.sleep(0.01)


def unpack_pictures(folder, count=NUM_PICTURES):
    """The first pictures of the emoji archive, each with a caption file."""
    with tarfile.open(ROOT / "assets/emoji/emoji.tar") as tar:
        for member in [member for member in tar if member.name.endswith(".webp")][:count]:
            path = folder / member.name
            path.write_bytes(tar.extractfile(member).read())
            path.with_suffix(".txt").write_text("an emoji")


def check(holds, what, found):
    """Prints that `what` holds, or ends the script with what was found instead."""
    if not holds:
        sys.exit(f"FAILED: {what}\nfound: {found}")
    print(f"ok: {what}", flush=True)
