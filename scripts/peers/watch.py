#!/usr/bin/env python3
"""Reads a run's TensorBoard files with the tensorboard package and compares them with the run.

    python scripts/peers/watch.py FOLDER PROGRAM MADE_UP_RUN

Makes up a run in FOLDER that is resumed further back, converts it with `PROGRAM report --to
tensorboard`, and compares every number (as its 32-bit value, bit for bit), every picture and the
texts. Prints what it has compared.
"""

import json
import math
import pathlib
import shutil
import struct
import subprocess
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}
# Curves and the fields of `metrics.jsonl` they come from, by kind of event.
FIELDS = {
    "loss/training": ("step", "loss"),
    "gradient_norm/all": ("step", "gradient_norm"),
    "learning_rate/learning_rate": ("step", "lr"),
    "memory/resident": ("step", "resident_bytes"),
    "spent/spent": ("step", "spent"),
    "step_secs/step": ("step", "secs"),
    "loss/test": ("test", "loss"),
    "attention/largest_logit": ("vitals", "largest_logit"),
}


def as_32_bits(value):
    """The bytes of a number's 32-bit value."""
    return struct.pack("<f", float(value))


def valid_events(path):
    """The events of a run, without those that came again after a resume."""
    events = []
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "start":
            events = [known for known in events if known.get("step", 0) <= event["step"]]
        events.append(event)
    return events


def compare(run):
    """Compares the files of a run with its events; returns what was compared."""
    events = valid_events(run / "metrics.jsonl")
    board = EventAccumulator(str(run / "tensorboard"), size_guidance=EVERYTHING)
    board.Reload()
    compared = {"numbers": 0, "pictures": 0, "texts": 0}
    for tag, (kind, field) in FIELDS.items():
        expected = [
            (e["step"], e[field]) for e in events if e["event"] == kind and e.get(field) is not None
        ]
        found = [(scalar.step, scalar.value) for scalar in board.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], tag
        for (step, value), (_, wanted) in zip(found, expected, strict=True):
            same = as_32_bits(value) == as_32_bits(wanted) or (
                math.isnan(value) and wanted == "NaN"
            )
            assert same, f"{tag} at step {step}: {value}, expected {wanted}"
        compared["numbers"] += len(found)
    pictures = board.Images("previews/pictures")
    expected = {e["step"]: run / "previews" / e["name"] for e in events if e["event"] == "preview"}
    assert [picture.step for picture in pictures] == sorted(expected)
    for picture in pictures:
        assert picture.encoded_image_string == expected[picture.step].read_bytes()
        compared["pictures"] += 1
    acts = [e for e in events if e["event"] == "guard" and e["action"] != "clip"]
    texts = board.Tensors("guard")
    for act, text in zip(acts, texts, strict=True):
        words = text.tensor_proto.string_val[0].decode()
        assert text.step == act["step"] and act["reason"] in words, words
        compared["texts"] += 1
    return compared


def main():
    folder, program, made_up = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    shutil.rmtree(folder, ignore_errors=True)
    for arguments in (["900"], ["--rewind"], ["--resume", "700"]):
        subprocess.run([made_up, folder, *arguments], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [program, "report", "--to", "tensorboard", folder], check=True, stdout=subprocess.DEVNULL
    )
    print(json.dumps(compare(folder)))


if __name__ == "__main__":
    main()
