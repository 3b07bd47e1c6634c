#!/usr/bin/env python3
"""Reads a run's files for TensorBoard, trackio and W&B with these programs, and compares them with
the run.

    python scripts/peers/watch.py FOLDER PROGRAM MADE_UP_RUN

Makes up a run in FOLDER that is resumed further back, converts it with `PROGRAM report --to`, and
compares every number bit for bit (TensorBoard's as its 32-bit value), every picture and the guard's
acts. W&B's are read with its messages, and are sent by `wandb sync` to a stand-in for its server on
this machine. Prints what it has compared.
"""

import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import zlib

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import wandb_server

EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}
# The recipe of the made-up run; addresses of alerts must not be passed on.
RECIPE = """
[lr]
peak = 0.0001

[preview]
prompts = ["a red fox in the snow"]

[report.alert]
webhook = "http://127.0.0.1/not-to-be-passed-on"
"""
STEP = "trainer/step"
PICTURES = "previews/pictures"
NOT_FINITE = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}


def make_up(folder, made_up):
    """Makes up a run, some of whose numbers are not finite."""
    shutil.rmtree(folder, ignore_errors=True)
    for arguments in (["900"], ["--rewind"], ["--resume", "700"]):
        subprocess.run([made_up, folder, *arguments], check=True, stdout=subprocess.DEVNULL)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for index, word in enumerate(NOT_FINITE):
        event = json.loads(lines[100 + index])
        assert event["event"] == "step"
        event["gradient_norm"] = word
        lines[100 + index] = json.dumps(event)
    path.write_text("\n".join(lines) + "\n")
    checkpoint = folder / "checkpoints/step-00000720"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.toml").write_text(RECIPE)


def valid_events(path):
    """The events of a run, without those that came again after a resume."""
    events = []
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "start":
            events = [known for known in events if known.get("step", 0) <= event["step"]]
        events.append(event)
    return events


def bins(chart, listed):
    """The losses by noise level."""
    name = chart + "/sigma {from:.2f}-{to:.2f}"
    return {name.format_map(each): each["loss"] for each in listed if each["count"]}


def numbers_of(event, start, samples):
    """The numbers of an event by name, from its own fields; `samples` are those before it."""
    if event["event"] == "step":
        secs, flops = event["secs"], event["flops"] / max(event["secs"], 1e-9)
        found = {
            "loss/training": event["loss"],
            "gradient_norm/all": event["gradient_norm"],
            "learning_rate/learning_rate": event["lr"],
            "memory/resident": event["resident_bytes"],
            "spent/spent": event["spent"],
            "step_secs/step": secs,
            "step_secs/data": event["data_secs"],
            "waiting/share": event["data_secs"] / secs,
            "arithmetic/flops_per_sec": flops,
            "mfu/share": flops / start["peak_flops"],
        }
        if samples is not None and event.get("applied", True):
            found["throughput/samples_per_sec"] = max(event["samples"] - samples, 0) / secs
        return found
    if event["event"] == "test":
        losses = {"loss/test": event["loss"], "loss/test_averaged_weights": event["ema"]["loss"]}
        return {**losses, **bins("test_loss", event["bins"])}
    if event["event"] == "vitals":
        logit = {"attention/largest_logit": event["largest_logit"]}
        return {**logit, **bins("training_loss", event["training"]["bins"])}
    return {}


def curves_of(events):
    """All numbers of a run: by name, steps and values."""
    curves, start, samples = {}, None, None
    for event in events:
        if event["event"] == "start":
            start, samples = event, None
        for name, value in numbers_of(event, start, samples).items():
            number = float(NOT_FINITE.get(value, value))
            curves.setdefault(name, []).append((event["step"], number))
        if event["event"] == "step":
            samples = event["samples"]
    return curves


def bits(value):
    """The bytes of a number; one byte for all that are NaN."""
    return b"N" if math.isnan(value) else struct.pack("<d", value)


def same_curves(found, expected, as_kept=float):
    """Compares curves; returns the number of their points. `as_kept` is what a program keeps."""
    assert sorted(found) == sorted(expected), set(found) ^ set(expected)
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        for (step, value), (_, wanted) in zip(found[name], points, strict=True):
            same = bits(float(value)) == bits(as_kept(wanted))
            assert same, f"{name} at step {step}: {value!r}, expected {wanted!r}"
    return sum(len(points) for points in expected.values())


def as_32_bits(value):
    """The 32-bit value of a number."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def pictures_of(run, events):
    """The previews of a run: steps and bytes."""
    shown = [event for event in events if event["event"] == "preview"]
    return [(event["step"], (run / "previews" / event["name"]).read_bytes()) for event in shown]


def same_acts(found, events):
    """Compares steps and texts with what the guard did beside clipping; returns their number."""
    acts = [event for event in events if event["event"] == "guard" and event["action"] != "clip"]
    for (step, text), act in zip(found, acts, strict=True):
        assert step == act["step"] and act["reason"] in text, text
    return len(acts)


def with_tensorboard(run, events):
    """Compares event files."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance=EVERYTHING)
    board.Reload()
    found = {}
    for name in board.Tags()["scalars"]:
        found[name] = [(scalar.step, scalar.value) for scalar in board.Scalars(name)]
    pictures = [(shown.step, shown.encoded_image_string) for shown in board.Images(PICTURES)]
    assert pictures == pictures_of(run, events)
    texts = []
    for text in board.Tensors("guard"):
        texts.append((text.step, text.tensor_proto.string_val[0].decode()))
    # This reader keeps texts of steps that come again; TensorBoard's own page drops them.
    all_events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "numbers": same_curves(found, curves_of(events), as_32_bits),
        "pictures": len(pictures),
        "acts": same_acts(texts, all_events),
    }


def with_trackio(run, events):
    """Compares trackio's database."""
    os.environ["TRACKIO_DIR"] = str(run / "trackio")
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "golden"))
    import trackio_schema
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    (project,) = SQLiteStorage.get_projects()
    (record,) = SQLiteStorage.get_run_records(project)
    assert project == record["name"] == run.name
    found, pictures = {}, []
    for row in SQLiteStorage.get_logs(project, run.name):
        step, _ = row.pop("step"), row.pop("timestamp")
        if PICTURES in row:
            picture = MEDIA_DIR / row[PICTURES]["file_path"]
            pictures.append((step, picture.read_bytes()))
            continue
        for name, value in row.items():
            found.setdefault(name, []).append((step, value))
    assert pictures == pictures_of(run, events)
    config = SQLiteStorage.get_run_config(project, run.name)
    assert config["lr"]["peak"] == 0.0001 and "report" not in config
    flags = SQLiteStorage.get_tab_availability_flags(project)
    assert flags["metrics"] and flags["media"] and flags["alerts"], flags
    alerts = SQLiteStorage.get_alerts(project, run.name)
    texts = sorted((alert["step"], alert["text"]) for alert in alerts)

    # Tables are those that this version of trackio makes.
    ours = trackio_schema.statements(SQLiteStorage.get_project_db_path(project))
    empty = SQLiteStorage.init_db("empty")
    theirs = trackio_schema.statements(empty)
    empty.unlink()
    assert ["".join(each.split()) for each in ours] == ["".join(each.split()) for each in theirs]
    return {
        "numbers": same_curves(found, curves_of(events)),
        "pictures": len(pictures),
        "acts": same_acts(texts, events),
    }


def records_of(path):
    """The messages of a log of W&B; every checksum must be right."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, place, record = path.read_bytes(), 7, b""
    assert data[:7] == b":W&B\xe1\xbe\x00"
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        checksum, num_bytes, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + 7 : place + 7 + num_bytes]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        place, record = place + 7 + num_bytes, record + part
        if kind in (1, 4):
            yield messages.Record.FromString(record)
            record = b""


def lines_of(path):
    """The history in a log of W&B, a dictionary a line."""
    for record in records_of(path):
        if record.WhichOneof("record_type") != "history":
            continue
        line = {}
        for item in record.history.item:
            *above, last = item.nested_key
            inner = line
            for word in above:
                inner = inner.setdefault(word, {})
            inner[last] = json.loads(item.value_json)
        assert line["_step"] == record.history.step.num
        yield line


def compare_lines(lines, run, events, picture):
    """Compares the history; `picture` returns the bytes of a file by its path."""
    found, pictures, texts = {}, [], []
    for number, line in enumerate(lines):
        assert line.pop("_step") == number
        step, _, _ = line.pop(STEP), line.pop("_timestamp"), line.pop("_runtime")
        if PICTURES in line:
            pictures.append((step, picture(line[PICTURES]["path"])))
        elif "guard" in line:
            texts.append((step, line["guard"]))
        else:
            for name, value in line.items():
                found.setdefault(name, []).append((step, value))
    assert pictures == pictures_of(run, events)
    return {
        "numbers": same_curves(found, curves_of(events)),
        "pictures": len(pictures),
        "acts": same_acts(texts, events),
    }


def with_wandb(run, events):
    """Compares a run of W&B: its file, and what `wandb sync` sends of it."""
    (folder,) = (run / "wandb").glob("offline-run-*")
    (log,) = folder.glob("run-*.wandb")
    in_file = compare_lines(
        lines_of(log), run, events, lambda path: (folder / "files" / path).read_bytes()
    )
    server = wandb_server.serve()
    sync = [pathlib.Path(sys.executable).parent / "wandb", "sync", folder.name]
    environment = {
        **os.environ,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_ERROR_REPORTING": "false",
    }
    subprocess.run(sync, cwd=folder.parent, env=environment, check=True, capture_output=True)
    server.shutdown()
    received = server.received
    lines = received.lines["wandb-history.jsonl"]
    sent = compare_lines(lines, run, events, received.files.__getitem__)

    # The run's facts, its last values, and the curve that the others are drawn over.
    bucket = received.buckets[-1]
    config = json.loads(bucket["config"])
    assert config["lr"]["value"] == {"peak": 0.0001} and "report" not in config
    assert any(metric.get("1") == STEP for metric in config["_wandb"]["value"]["m"]), config
    assert received.buckets[0]["displayName"] == run.name
    summary = json.loads(received.files["wandb-summary.json"])
    tests = [event for event in events if event["event"] == "test"]
    assert summary["loss/test"] == tests[-1]["loss"], summary
    return {"file": in_file, "synced": sent, "end": received.end}


def main():
    folder, program, made_up = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    make_up(folder, made_up)
    events = valid_events(folder / "metrics.jsonl")
    compare = {"tensorboard": with_tensorboard, "trackio": with_trackio, "wandb": with_wandb}
    for name, with_program in compare.items():
        command = [program, "report", "--to", name, folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(json.dumps({name: with_program(folder, events)}))


if __name__ == "__main__":
    main()
