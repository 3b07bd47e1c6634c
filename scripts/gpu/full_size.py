#!/usr/bin/env python3
"""Trains SDXL's whole UNet, 2,567,463,684 parameters, in the memory of one 24 GB card.

    python3 scripts/gpu/full_size.py [WORK] [--program FILE] [--random FILE] [--diffusers PYTHON]

Needs finished programs (`make build`), 50 GB of disk and 20 GiB of memory; about an hour on two
cores. Weights are random numbers of the true shapes. Everything is in bf16 with fp32 masters,
moments in 8 bits, updates in the backward pass, recomputation, one sample of 512x512 a step:

- Run A makes 20 steps, with checkpoints at 10 and 20. Its test loss, of fixed noise, must fall.
- Run B is a copy of A at step 10 by hard links. It is killed with -9 in step 11, resumed to step
  20, and must equal A by the BLAKE3 of every file of weights, masters and moments.
- B is exported as a diffusers folder and, with --diffusers, opened by that Python's diffusers.
- Two steps of 1024x1024 are made for their memory.

The largest resident set (VmHWM, mapped files included) of every process is printed, and compared
with 19.4 GiB, which is 0.45 of what fp32 gradients and moments need. WORK (default
runs/full-size) gets results.json; its large files are removed at the end. The exit status is 1 if
a check failed.
"""

import argparse
import datetime
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import files
from session import processor

ROOT = pathlib.Path(__file__).resolve().parents[2]
DISK_GB = 50
LIMIT_GIB = 19.4
NUM_PARAMETERS = 2_567_463_684
RECIPE = """
[run]
dir = "{folder}"
seed = 42
device = "cpu"

[model]
base = "{base}"

[[data]]
path = "{dataset}"

[train]
samples = {steps}
micro_batch = 1
micro_batches = 1
text_encoders = "frozen"
dtype = "bf16"
update_in_backward = true

[memory]
checkpointing = "full"

[optimizer]
state = "8bit"

[lr]
peak = 1e-4
warmup_samples = 0

[guard]
skip_by = "loss"
vitals_every_updates = 0
snapshot_gib = 0

[test]
every_steps = {test_every}
bins = 2

[checkpoint]
every_steps = {save_every}
keep = 3
in_background = false

[preview]
prompts = []
"""


class Work:
    """The folder, and the largest resident set of every process."""

    def __init__(self, args):
        self.args = args
        self.folder = args.work.resolve()
        self.processes = []
        self.checks = []

    def run(self, name, *words, kill_when=None):
        """Runs a command; returns its standard output. `kill_when` says when it is killed."""
        began = time.monotonic()
        log = self.folder / "output.txt"
        environment = {**os.environ, "RUST_LOG": "warn"}
        with log.open("wb") as out:
            process = subprocess.Popen([*map(str, words)], stdout=out, env=environment)
            if kill_when is None:
                _, status, usage = os.wait4(process.pid, 0)
            else:
                while not kill_when():
                    if process.poll() is not None:
                        sys.exit(f"{name}: it ended before it was killed")
                    time.sleep(0.1)
                process.send_signal(signal.SIGKILL)
                _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        gib = usage.ru_maxrss / 2**20
        secs = time.monotonic() - began
        self.processes.append({"process": name, "gib": round(gib, 3), "secs": round(secs, 1)})
        print(f"{name}: {gib:.2f} GiB, {secs:.0f} s", flush=True)
        if process.returncode != (0 if kill_when is None else -signal.SIGKILL):
            sys.exit(f"{name}: exit status {process.returncode}")
        return log.read_text()

    def rectiflow(self, name, *words, kill_when=None):
        return self.run(name, self.args.program, "--json", *words, kill_when=kill_when)

    def check(self, what, is_true, found):
        self.checks.append({"check": what, "passed": bool(is_true), "found": found})
        print(f"{'passed' if is_true else 'FAILED'}: {what}: {found}", flush=True)

    def prepare(self, side):
        """A data set of three pictures, one of them held out."""
        pictures, dataset = self.folder / f"pictures-{side}", self.folder / f"set-{side}"
        if (dataset / "manifest.json").exists():
            return dataset
        files.draw_pictures(pictures, 3, side)
        words = ["--vae", self.folder / "base/vae", "--set", f"prep.area_px={side * side}"]
        words += ["--set", "prep.test_count=1", "--set", "prep.encode_batch=1"]
        self.rectiflow(f"prep {side}", "prep", pictures, "--out", dataset, *words)
        return dataset

    def train(self, name, folder, dataset, steps, every, kill_when=None):
        recipe = self.folder / f"{folder.name}.toml"
        text = RECIPE.format(
            folder=folder,
            base=self.folder / "base",
            dataset=dataset,
            steps=steps,
            save_every=every,
            test_every=every,
        )
        recipe.write_text(text)
        self.rectiflow(name, "train", recipe, kill_when=kill_when)


def events(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if event["event"] == kind]


def state_hashes(checkpoint):
    """The hashes of weights, masters and moments, by file."""
    found = {}
    for line in (checkpoint / "BLAKE3SUMS").read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        if name.endswith(".safetensors"):
            found[name] = digest
    return found


def step_folder(run, step):
    return run / "checkpoints" / f"step-{step:08}"


def run_a(work, dataset):
    folder = work.folder / "a"
    work.train("run A, 20 steps", folder, dataset, 20, 10)
    losses = [event["loss"] for event in events(folder, "test")]
    work.check("the test loss falls", losses[-1] < losses[0], losses)
    secs = sorted(event["secs"] for event in events(folder, "step"))
    work.step_secs = secs[len(secs) // 2]
    print(f"a step: {work.step_secs:.1f} s (median of {len(secs)})", flush=True)
    return folder


def run_b(work, a, dataset):
    """A copy of A at step 10 by hard links, killed and resumed."""
    wanted = state_hashes(step_folder(a, 20))
    b = work.folder / "b"
    kept = step_folder(a, 10)
    shutil.copytree(kept, step_folder(b, 10), copy_function=os.link)
    lines = (a / "metrics.jsonl").read_text().splitlines(keepends=True)
    until = next(i for i, line in enumerate(lines) if json.loads(line).get("step", 0) > 10)
    (b / "metrics.jsonl").write_text("".join(lines[:until]))
    shutil.rmtree(step_folder(a, 20))
    starts = len(events(b, "start"))

    def in_step_11():
        if len(events(b, "start")) == starts:
            return False
        # Half of a step after the start.
        time.sleep(work.step_secs / 2)
        return True

    work.train("run B, killed in step 11", b, dataset, 20, 10, kill_when=in_step_11)
    reached = max(event["step"] for event in events(b, "step"))
    work.check("B was killed in step 11", reached == 10, f"last step {reached}")
    work.train("run B, resumed", b, dataset, 20, 10)
    found = state_hashes(step_folder(b, 20))
    differ = sorted(name for name in wanted if found.get(name) != wanted[name])
    work.check("B equals A by BLAKE3", not differ and found.keys() == wanted.keys(), differ)
    return b


def export(work, b):
    out = work.folder / "export"
    words = ["export", "--model", step_folder(b, 20), "--out", out]
    words += ["--format", "diffusers", "--dtype", "bf16"]
    work.rectiflow("export", *words)
    if not work.args.diffusers:
        return
    code = (
        "import sys, torch, diffusers\n"
        "unet = diffusers.UNet2DConditionModel.from_pretrained("
        "sys.argv[1], subfolder='unet', torch_dtype=torch.bfloat16)\n"
        "print(sum(p.numel() for p in unet.parameters()))\n"
    )
    os.environ["TORCH_USE_RTLD_GLOBAL"] = "1"
    found = work.run("diffusers opens the export", work.args.diffusers, "-c", code, out)
    count = int(found.split()[-1])
    work.check("diffusers counts the parameters", count == NUM_PARAMETERS, count)


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("work", type=pathlib.Path, nargs="?", default="runs/full-size")
    built = ROOT / "target/release"
    parser.add_argument("--program", type=pathlib.Path, default=built / "rectiflow")
    parser.add_argument("--random", type=pathlib.Path, default=built / "examples/random_sdxl")
    parser.add_argument("--diffusers", type=pathlib.Path)
    return parser.parse_args()


def main():
    args = arguments()
    work = Work(args)
    work.folder.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(work.folder).free / 1e9
    if free_gb < DISK_GB:
        sys.exit(f"{work.folder}: {free_gb:.0f} GB of disk are free, {DISK_GB} are needed")
    began = time.monotonic()
    if not (work.folder / "base/scheduler").exists():
        work.run("random weights", args.random, work.folder / "base", "bf16")
    dataset = work.prepare(512)
    a = run_a(work, dataset)
    b = run_b(work, a, dataset)
    shutil.rmtree(a)
    export(work, b)
    shutil.rmtree(work.folder / "export")
    shutil.rmtree(b)
    large = work.folder / "large"
    work.train("two steps of 1024x1024", large, work.prepare(1024), 2, 2)
    shutil.rmtree(large)
    worst = max(work.processes, key=lambda process: process["gib"])
    trained = [process for process in work.processes if process["process"].startswith("run ")]
    largest = max(process["gib"] for process in trained)
    what = f"training at 512x512 takes at most {LIMIT_GIB} GiB"
    work.check(what, largest <= LIMIT_GIB, f"{largest:.2f} GiB")
    for folder in ["base", "set-512", "set-1024", "pictures-512", "pictures-1024"]:
        shutil.rmtree(work.folder / folder)
    results = {
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "processor": processor(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "step_secs": work.step_secs,
        "largest": worst,
        "processes": work.processes,
        "checks": work.checks,
    }
    (work.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(not check["passed"] for check in work.checks))


if __name__ == "__main__":
    main()
