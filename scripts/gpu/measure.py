#!/usr/bin/env python3
"""Checks and measures rectiflow on a machine with a GPU, and writes one page.

    scripts/gpu/run [--out FOLDER] [--program FILE] [--device cuda] [--minutes 9]
    scripts/gpu/run --dry-run

Needs Python 3.11 and finished programs (`make gpu` builds them and fills target/gpu, which can be
copied to another machine); no Rust, no network, no package of Python. Where torch and diffusers are
installed their training step is measured too, in turn with ours.

Checked, against this program's own numbers on the processor: training steps in fp32 and bf16, with
recomputation and with two micro-batches, of the tiny model and of one of 48 M parameters; a run and
its resume; pictures; latents of the autoencoder. Measured: a training step at SDXL's size and
1024x1024, its memory beside the estimate; preparation; sampling. Stages are in the order of their
worth; what does not fit into --minutes is named as not run.

FOLDER gets gpu.md, the page, and results.jsonl, every command with its answer. The exit status is 1
if a check failed. --dry-run goes through every stage with tiny models on the processor.
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

import files
from session import Session, processor, today

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
# Dense bf16 products of an H100 SXM or H200 SXM, by their data sheets.
PEAK_FLOPS = 989.4e12
# SDXL's topology with 48 M parameters, as scripts/peers/bench_step.py has it.
MIDDLE = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [96, 192, 320],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 1,
    "attention_head_dim": [2, 3, 5],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
FP32_LIMIT, BF16_LIMIT = 1e-3, 5e-2


class Kit:
    """The programs and files of a session."""

    def __init__(self, args):
        self.args = args
        names = ["bin/rectiflow", "target/cuda/release/rectiflow", "target/release/rectiflow"]
        found = [ROOT / name for name in names if (ROOT / name).exists()]
        self.program = args.program or (found[0] if found else None)
        if self.program is None:
            sys.exit("no rectiflow in bin/ or target/: build it with `make gpu`, or pass --program")
        self.program = self.program.resolve()
        self.tiny = args.work / "tiny"
        if not self.tiny.exists():
            packed = ROOT / "assets/tiny-sdxl"
            with tarfile.open(packed / "base.tar.gz") as archive:
                archive.extractall(self.tiny, filter="data")
            shutil.copytree(packed / "vae", self.tiny / "vae", dirs_exist_ok=True)
        self.middle = args.work / "middle"
        self.middle.mkdir(parents=True, exist_ok=True)
        (self.middle / "config.json").write_text(json.dumps(MIDDLE))
        self.full = args.work / "full"
        self.has_peer = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))

    def random_sdxl(self):
        beside = self.program.parent
        places = [beside / "random_sdxl", beside / "examples/random_sdxl"]
        return next((place for place in places if place.exists()), None)

    def command(self, *words):
        return [self.program, "--json", *words]


def libraries(session):
    """Adds the folders of an installed torch's libraries, for a program built elsewhere."""
    folders = []
    for name in ["torch", "nvidia"]:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec else []:
            pattern = "lib" if name == "torch" else "*/lib"
            folders += sorted(pathlib.Path(place).glob(pattern))
    known = session.environment.get("LD_LIBRARY_PATH", "")
    joined = ":".join([*map(str, folders), known] if known else map(str, folders))
    if joined:
        session.environment["LD_LIBRARY_PATH"] = joined


def machine(session, kit):
    """What the machine is; and whether the program starts on it and uses the device."""
    facts = session.facts
    facts["date"] = today()
    facts["processor"] = processor()
    query = "name,driver_version,memory.total,power.limit"
    if session.card.is_there:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        facts["GPU"] = done.stdout.strip().splitlines()[0] if done.stdout else "none found"
    built = ROOT / "built.json"
    facts["built"] = built.read_text().strip() if built.exists() else "in this folder"
    facts["command"] = " ".join(sys.argv)
    facts["PyTorch and diffusers beside it"] = "yes" if kit.has_peer else "not installed"
    start = session.call("version", [kit.program, "--version"], 60)
    if "error" in start:
        libraries(session)
        start = session.call("version, with torch's libraries", [kit.program, "--version"], 60)
    if "error" in start:
        sys.exit(
            f"{kit.program} does not start: {start['error']}; it needs the libtorch that it was "
            f"built with ({facts['built']}): install that torch beside this Python"
        )
    if session.card.is_there:
        check_nvrtc(session)
    tiny = kit.command("bench", "step", "--unet", kit.tiny / "unet", "--device", kit.args.device)
    first = session.call("the device", [*tiny, "--batch", 1, "--size", "64x64", "--steps", 3], 120)
    if "error" in first:
        session.check("the device can be used", first["error"], 0)
        sys.exit(f"{kit.args.device}: {first['error']}")


def check_nvrtc(session):
    """libtorch loads this library when a kernel first needs it, far from the start."""
    load = "import ctypes; ctypes.CDLL('libnvrtc.so.13')"
    words = [sys.executable, "-c", load]
    if session.answer(words, 30, session.environment).get("error"):
        session.facts["libnvrtc"] = (
            "libnvrtc.so.13 is not found; complex kernels would fail: install nvidia-cuda-nvrtc"
        )


def differences(found, reference):
    """The largest relative differences of losses and of gradient norms."""
    for answer in (found, reference):
        if "error" in answer:
            return [answer["error"]] * 2
    largest = []
    for key in ["losses", "gradient_norms"]:
        pairs = zip(found[key], reference[key], strict=True)
        largest.append(max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs))
    return largest


def parity(session, kit):
    """Training steps on the processor and on the device, from the same weights and batch."""
    small = kit.args.small
    steps = 3 if small else 8
    heads = ["model, set-up", "losses", "gradient norms"]
    text = f"Largest relative difference from fp32 on the processor over {steps} steps."
    table = session.table("Training steps against the processor", heads, text)
    models = [("tiny", kit.tiny / "unet", [], 4, 8 if small else 16)]
    if not small:
        models.append(("48 M", kit.middle, ["--random"], 4, 32))
    for name, folder, words, batch, side in models:
        config = json.loads((folder / "config.json").read_text())
        file = kit.args.work / f"{name.replace(' ', '-')}.safetensors"
        files.write_tensors(file, files.batch_tensors(config, batch, side))
        step = kit.command("bench", "step", "--unet", folder, *words, "--input", file)
        step += ["--steps", steps]
        own = [*step, "--device", kit.args.device]
        reference = session.call(f"{name}: processor", [*step, "--device", "cpu"], 120)
        rows = [
            ("fp32", [], NO_TF32, FP32_LIMIT),
            ("fp32, recomputation", ["--checkpointing"], NO_TF32, FP32_LIMIT),
            ("fp32, two micro-batches", ["--micro-batches", 2], NO_TF32, FP32_LIMIT),
            ("bf16", ["--dtype", "bf16"], {}, BF16_LIMIT),
            ("bf16, recomputation", ["--dtype", "bf16", "--checkpointing"], {}, BF16_LIMIT),
        ]
        for what, more, environment, limit in rows:
            found = session.call(f"{name}: {what}", [*own, *more], 90, environment)
            losses, norms = differences(found, reference)
            session.check(f"{name}, {what}: losses", losses, limit)
            session.check(f"{name}, {what}: norms", norms, 10 * limit)
            session.row(table, f"{name}, {what}", shown(losses), shown(norms))


def shown(value):
    return f"{value:.1e}" if isinstance(value, float | int) else value


def losses_of(folder):
    """The losses of a run's steps; of a step that was repeated, the last."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            found[event["step"]] = event["loss"]
    return found


def prepared(session, kit):
    """The pictures' data set, made on the processor; and what latents of the device differ by."""
    pictures, side = kit.args.work / "discs", 128
    if not pictures.exists():
        files.draw_pictures(pictures, 12 if kit.args.small else 48, side)
    found = {}
    for name, device in [("cpu", "cpu"), ("device", kit.args.device)]:
        out = kit.args.work / f"set-{name}"
        shutil.rmtree(out, ignore_errors=True)
        words = ["prep", pictures, "--out", out, "--vae", kit.tiny / "vae", "--device", device]
        recipe = ["--recipe", ROOT / "recipes/demo.toml"]
        done = session.call(f"prep: {name}", kit.command(*words, *recipe), 120, NO_TF32)
        if "error" in done:
            session.check("latents of the autoencoder", done["error"], FP32_LIMIT)
            return None
        found[name] = [files.read_tensor(path, "latents") for path in sorted(out.glob("latents/*"))]
    worst = 0.0
    for mine, reference in zip(found["device"], found["cpu"], strict=True):
        apart = sum((a - b) ** 2 for a, b in zip(mine, reference, strict=True)) ** 0.5
        worst = max(worst, apart / sum(b * b for b in reference) ** 0.5)
    session.check("latents of the autoencoder", worst, FP32_LIMIT)
    return kit.args.work / "set-cpu"


def train(session, kit):
    """A run of the tiny model on the processor and on the device; its resume; two ranks."""
    dataset = prepared(session, kit)
    if dataset is None:
        return
    steps = 4 if kit.args.small else 20
    losses = {}
    kinds = [("cpu", "cpu", "fp32", FP32_LIMIT), ("device", kit.args.device, "fp32", FP32_LIMIT)]
    kinds.append(("device-bf16", kit.args.device, "bf16", BF16_LIMIT))
    for name, device, dtype, limit in kinds:
        folder = kit.args.work / f"run-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        command = run_command(kit, folder, dataset, device, dtype, steps)
        done = session.call(f"run: {name}", command, 120, NO_TF32 if dtype == "fp32" else {})
        if "error" in done:
            session.check(f"run, {name}", done["error"], limit)
            continue
        losses[name] = losses_of(folder)
        if name != "cpu" and "cpu" in losses:
            pairs = [(losses[name][step], loss) for step, loss in losses["cpu"].items()]
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            session.check(f"run of {len(pairs)} steps, {name}: losses", worst, limit)
        if name == "device":
            resume(session, command, folder, losses[name])
    ranks(session, kit, dataset)


def run_command(kit, folder, dataset, device, dtype, steps):
    settings = {
        "run.dir": folder,
        "run.device": device,
        "train.dtype": dtype,
        "train.samples": 32 * steps,
        "lr.warmup_samples": 0,
        "model.base": kit.tiny,
        "data.path": dataset,
        "checkpoint.every_steps": steps // 2,
        "test.every_steps": steps,
        "preview.prompts": "[]",
    }
    words = ["train", ROOT / "recipes/demo.toml"]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return kit.command(*words)


def resume(session, command, folder, before):
    """Repeats the second half of a run from the checkpoint in its middle."""
    checkpoints = sorted(folder.glob("checkpoints/step-*"))
    if len(checkpoints) < 2:
        session.check("resume", f"{len(checkpoints)} checkpoints", FP32_LIMIT)
        return
    shutil.rmtree(checkpoints[-1])
    done = session.call("run: resumed", command, 120, NO_TF32)
    if "error" in done:
        session.check("resume", done["error"], FP32_LIMIT)
        return
    after = losses_of(folder)
    worst = max(abs(after[step] - loss) / abs(loss) for step, loss in before.items())
    session.check("resume from the middle: losses", worst, FP32_LIMIT)


def ranks(session, kit, dataset):
    """Two ranks: on a processor they exchange by Gloo; NCCL refuses two on one card."""
    folder = kit.args.work / "run-ranks"
    shutil.rmtree(folder, ignore_errors=True)
    command = run_command(kit, folder, dataset, kit.args.device, "fp32", 2)
    done = session.call("two ranks", [*command, "--ranks", 2], 90, NO_TF32)
    session.facts["two ranks on this machine"] = done.get("error", "they train")


def pictures(session, kit):
    """Pictures of one seed on the processor and on the device."""
    found = {}
    kinds = [("cpu", "cpu", "fp32"), ("fp32", kit.args.device, "fp32")]
    kinds.append(("bf16", kit.args.device, "bf16"))
    for name, device, dtype in kinds:
        out = kit.args.work / f"pictures-{name}"
        prompt = "a 3D emoji of red apple on a white background"
        words = ["sample", "--model", kit.tiny, "--prompt", prompt, "--steps"]
        words += [2 if kit.args.small else 20, "--size", "128x128", "--batch", 1, "--seed", 1]
        words += ["--parameterization", "eps", "--dtype", dtype, "--device", device, "--out", out]
        environment = NO_TF32 if dtype == "fp32" else {}
        done = session.call(f"picture: {name}", kit.command(*words), 90, environment)
        if "error" in done:
            session.check(f"picture, {name}", done["error"], 0)
            return
        drawn = sorted(path for path in out.glob("*.png") if path.name != "grid.png")[-1]
        found[name] = files.read_png(drawn)[2]
    for name, limit in [("fp32", 0.5), ("bf16", 8)]:
        pairs = zip(found[name], found["cpu"], strict=True)
        mean = sum(abs(a - b) for a, b in pairs) / len(found["cpu"])
        session.check(f"picture, {name}: mean difference in levels of 255", mean, limit)


def full_model(session, kit):
    """Random weights of SDXL's size, written once. Nothing where that is not possible."""
    if kit.args.small or (kit.full / "vae").exists():
        return
    program = kit.random_sdxl()
    if program:
        session.call("random weights of SDXL's size", [program, kit.full, "bf16"], 150)


def full_unet(kit):
    if kit.args.small:
        return kit.middle, ["--random"]
    if (kit.full / "unet").exists():
        return kit.full / "unet", []
    return ROOT / "crates/rectiflow-sdxl/configs/unet", ["--random"]


def size(kit):
    return "64x64" if kit.args.small else "1024x1024"


def steps(session, kit, rows):
    """Training steps at SDXL's size; ours and PyTorch's in turn."""
    heads = ["micro-batch, checkpointing", "ms", "samples/s", "of 989 TFLOP/s", "card GiB"]
    heads += ["estimated GiB"]
    text = f"Random weights, bf16, {size(kit)}. Floating-point operations are the model's own: "
    text += "what is recomputed does not count."
    table = session.table("A training step", heads, text)
    total = total_gib(session)
    for batch, mode in rows:
        unet, words = full_unet(kit)
        command = kit.command("bench", "step", "--unet", unet, *words, "--device", kit.args.device)
        command += ["--dtype", "bf16", "--size", size(kit), "--batch", batch, "--steps", 6]
        needed = estimated_gib(session, kit, batch, mode)
        if mode == "full":
            command += ["--checkpointing"]
        if mode == "budget":
            command += ["--budget-gib", 1 if kit.args.small else f"{0.85 * (total or 80):.0f}"]
        name = f"{batch}, {mode}"
        if total and needed and mode != "budget" and needed > total - 2:
            said = f"not run: it needs {needed:.0f} GiB and the card has {total:.0f}"
            session.row(table, name, said, "", "", "", f"{needed:.1f}")
            continue
        found = session.call(f"step: {name}", command, 100)
        session.row(table, name, *step_cells(kit, batch, found, found.get("estimated_bytes")))
        if (batch, mode) == rows[0]:
            peers(session, kit, table, batch)


def total_gib(session):
    """The card's memory, from the machine's facts: name, driver, "81559 MiB", power."""
    words = session.facts.get("GPU", "").split(",")
    numbers = [word.split()[0] for word in words if "MiB" in word]
    return float(numbers[0]) / 1024 if numbers else None


def estimated_gib(session, kit, batch, mode):
    words = ["bench", "calls", "--batch", batch, "--size", size(kit), "--steps", 0]
    if kit.args.small:
        words += ["--unet", kit.middle]
    found = session.call(
        f"calls: {batch}, {mode}", kit.command(*words, *["--checkpointing"] * (mode == "full")), 60
    )
    return found["estimated_bytes"] / 2**30 if "estimated_bytes" in found else None


def step_cells(kit, batch, found, estimated=None):
    if "error" in found:
        return [found["error"], "", "", "", ""]
    secs = 1 / found["steps_per_sec"]
    # Three forward passes of the UNet for a sample of 1024x1024 and 77 tokens, by `plan`.
    share = "" if kit.args.small else f"{100 * 20.28e12 * batch / secs / PEAK_FLOPS:.1f}%"
    card = f"{found['card_gib']:.1f}" if found["card_gib"] else ""
    guess = f"{estimated / 2**30:.1f}" if estimated else ""
    return [f"{1e3 * secs:.0f}", f"{batch / secs:.2f}", share, card, guess]


def peers(session, kit, table, batch):
    if not kit.has_peer:
        session.row(table, "PyTorch + diffusers", "not installed here", "", "", "", "")
        return
    unet = full_unet(kit)[0]
    command = [sys.executable, HERE / "peer.py", "--unet", unet, "--device", kit.args.device]
    command += ["--size", size(kit), "--batch", batch, "--steps", 3 if kit.args.small else 6]
    kinds = [("eager", []), ("channels last", ["--channels-last"])]
    kinds += [("eager, full checkpointing", ["--checkpointing"]), ("torch.compile", ["--compile"])]
    for name, words in kinds[: 1 if kit.args.small else None]:
        found = session.call(f"diffusers: {name}", [*command, *words], 90)
        session.row(table, f"diffusers, {batch}, {name}", *step_cells(kit, batch, found))


def preparation(session, kit):
    """Pictures a second through the autoencoder."""
    table = session.table("Preparation", ["encode_batch", "pictures/s", "card GiB"])
    vae = kit.full / "vae" if (kit.full / "vae").exists() else kit.tiny / "vae"
    side, count = (64, 6) if kit.args.small else (1024, 64)
    pictures = kit.args.work / f"pictures-{side}"
    if not pictures.exists():
        files.draw_pictures(pictures, count, side)
    for batch in [4] if kit.args.small else [8, 16]:
        out = kit.args.work / f"prepared-{batch}"
        shutil.rmtree(out, ignore_errors=True)
        words = ["prep", pictures, "--out", out, "--vae", vae, "--device", kit.args.device]
        words += ["--set", f"prep.encode_batch={batch}", "--set", f"prep.area_px={side * side}"]
        if kit.args.small:
            words += ["--set", "prep.min_side_px=32", "--set", "prep.bucket_min_px=64"]
        found = session.call(f"prep: {batch}", kit.command(*words), 90)
        if "error" in found:
            session.row(table, batch, found["error"], "")
            continue
        secs = found.get("summary", {}).get("secs") or found["wall_secs"]
        card = f"{found['card_gib']:.1f}" if found["card_gib"] else ""
        session.row(table, batch, f"{count / secs:.1f}", card)


def sampling(session, kit):
    """Pictures a second."""
    heads = ["batch", "pictures/s", "load s", "card GiB"]
    table = session.table("Sampling, 28 steps, guidance", heads)
    model = kit.full if (kit.full / "vae").exists() else kit.tiny
    for batch in [1] if kit.args.small else [1, 4]:
        words = ["bench", "sample", "--model", model, "--device", kit.args.device]
        words += ["--dtype", "bf16", "--size", size(kit), "--batch", batch, "--rounds", 1]
        words += ["--parameterization", "flow", "--steps", 2 if kit.args.small else 28]
        found = session.call(f"sample: {batch}", kit.command(*words), 120)
        if "error" in found:
            session.row(table, batch, found["error"], "", "")
            continue
        card = f"{found['card_gib']:.1f}" if found["card_gib"] else ""
        cells = [f"{found['images_per_sec']:.3f}", f"{found['load_secs']:.1f}", card]
        session.row(table, batch, *cells)


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu-out"))
    parser.add_argument("--program", type=pathlib.Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--dry-run", dest="small", action="store_true")
    args = parser.parse_args()
    if args.small:
        args.device = "cpu"
    return args


def main():
    args = arguments()
    out = args.out.resolve()
    with tempfile.TemporaryDirectory(prefix="rectiflow-gpu-") as work:
        args.work = pathlib.Path(work)
        session, kit = Session(args, out, args.work), Kit(args)
        (out / "results.jsonl").unlink(missing_ok=True)
        machine(session, kit)
        parity(session, kit)
        full_model(session, kit)
        first = [(4, "off"), (4, "full"), (8, "budget"), (16, "full")]
        rest = [(4, "budget"), (8, "full"), (8, "off"), (16, "budget"), (16, "off")]
        if args.small:
            first, rest = [(1, "off"), (1, "budget")], [(1, "full")]
        steps(session, kit, first)
        train(session, kit)
        pictures(session, kit)
        preparation(session, kit)
        sampling(session, kit)
        steps(session, kit, rest)
        session.facts["minutes"] = f"{args.minutes - session.remaining() / 60:.1f}"
        session.write_page()
    print(f"{out / 'gpu.md'}: {sum(not check[3] for check in session.checks)} checks failed")
    sys.exit(any(not check[3] for check in session.checks))


if __name__ == "__main__":
    main()
