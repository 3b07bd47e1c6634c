"""Draws the same pictures with rectiflow and with a real ComfyUI, and compares them.

    make peers-comfy COMFYUI=FOLDER

FOLDER is ComfyUI's source. Nothing is written there: models, nodes and pictures are in --work, and
the server listens on this machine alone. Every picture of rectiflow carries its graph; the graph is
sent to the server, and dropped on the page in headless Chromium. Four things are shown:

- each setting of `rectiflow sample` draws the same picture in ComfyUI, or the graph's `differences`
  say why not;
- the page sends the graph that is in the picture;
- a v export is known without a node, and a flow export by the loader node of integrations/comfyui;
- what ComfyUI says of the nodes that are used, for the unit tests (--object-info).

The model is tiny (tiny_sizes.py): the trained checkpoint of `make demo` where there is one, the
demo's base for whatever else a model can predict. Exits with 1 if a promise is broken.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import shutil
import subprocess
import sys

import cases
import numpy as np
from page import Page, differences
from PIL import Image
from server import Server

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
DEFAULTS = ["--size=64x64", "--steps=4", "--seed=7", "--cfg=4"]
# ComfyUI truncates a level where rectiflow rounds it, after rounding in other places of fp32.
EQUAL_LEVELS = 2
SHIFT = 3
OWN_NODES = {
    "CheckpointLoaderSimple",
    "ModelSamplingSD3",
    "ModelSamplingDiscrete",
    "RescaleCFG",
    "PerturbedAttentionGuidance",
    "PrimitiveStringMultiline",
    "CLIPTextEncode",
    "CLIPTextEncodeSDXL",
    "EmptyLatentImage",
    "KSampler",
    "VAEDecode",
    "SaveImage",
}
VERDICTS = ("equal", "named", "BROKEN")
BEGIN, END = "<!-- peers-comfy -->\n", "<!-- /peers-comfy -->\n"


class Comparison:
    """The two programs, and what was found so far."""

    def __init__(self, args, server):
        self.args = args
        self.server = server
        self.rows = []

    def draw(self, case, number):
        """Our pictures and the program's answer."""
        out = self.args.work / "ours" / f"{number:03}"
        shutil.rmtree(out, ignore_errors=True)
        model = self.server.base / "models/checkpoints" / f"{case.parameterization}.safetensors"
        command = [self.args.program, "sample", f"--model={model}", f"--out={out}", "--json"]
        # A later value of an option replaces an earlier one.
        given = {argument.split("=")[0] for argument in case.arguments}
        command += [option for option in DEFAULTS if option.split("=")[0] not in given]
        command += [f"--prompt={prompt}" for prompt in case.prompts]
        command += [f"--negative={case.negative}", *case.arguments]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"{case}: {run.stderr}")
        answer = json.loads(run.stdout.splitlines()[-1])
        return out, answer

    def compare(self, case, number):
        """Draws a case with both programs; adds a row."""
        out, answer = self.draw(case, number)
        files = [out / image for sample in answer["samples"] for image in sample["images"]]
        prompt, workflow = graphs(files[0])
        named = workflow["extra"]["rectiflow"]["differences"]
        drawn = self.server.draw(prompt)
        distance = drawn if isinstance(drawn, str) else levels(files, drawn)
        self.add(case.kind, f"{case.parameterization}, {case.name}", distance, named)
        return files

    def add(self, kind, name, distance, named):
        """`distance` is the largest and the mean difference in levels, or the server's words."""
        is_equal = not isinstance(distance, str) and distance[0] <= EQUAL_LEVELS
        verdict = "equal" if is_equal else "named" if named else "BROKEN"
        if is_equal and named:
            verdict = "equal, named"
        self.rows.append((kind, name, verdict, distance, named))
        if verdict != "equal":
            print(f"{kind}: {name}: {verdict}: {shown(distance)}; {'; '.join(named)}", flush=True)


def graphs(picture):
    """The two forms of a picture's graph."""
    texts = Image.open(picture).text
    return json.loads(texts["prompt"]), json.loads(texts["workflow"])


def levels(ours, theirs):
    """The largest and the mean difference of two lists of pictures, of 255."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} pictures for {len(ours)}"
    largest, means = 0, []
    for one, other in zip(ours, theirs, strict=True):
        first, second = (np.asarray(Image.open(path).convert("RGB"), int) for path in (one, other))
        if first.shape != second.shape:
            return f"{second.shape} for {first.shape}"
        gap = np.abs(first - second)
        largest = max(largest, int(gap.max()))
        means.append(gap.mean())
    return largest, float(np.mean(means))


def shown(distance):
    if isinstance(distance, str):
        return distance
    return f"largest {distance[0]}, mean {distance[1]:.2f} of 255"


def prepare(args):
    """The server's folder: single files of all kinds, the loader node, the tiny model's sizes."""
    base = args.work.resolve() / "comfyui"
    checkpoints = base / "models/checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for parameterization in cases.PARAMETERIZATIONS:
        model = args.flow if parameterization == "flow" else args.base
        out = checkpoints / f"{parameterization}.safetensors"
        command = [args.program, "export", f"--model={model}", "--format=single-file"]
        command += [f"--out={out}", "--dtype=fp32", f"--parameterization={parameterization}"]
        subprocess.run([*command, f"--shift={SHIFT}"], check=True, capture_output=True)
    nodes = base / "custom_nodes"
    shutil.rmtree(nodes, ignore_errors=True)
    skip_compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "integrations/comfyui", nodes / "rectiflow", ignore=skip_compiled)
    (nodes / "tiny").mkdir()
    shutil.copy(HERE / "tiny_sizes.py", nodes / "tiny")
    parts = ("unet", "text_encoder", "text_encoder_2", "vae")
    sizes = {part: json.loads((args.base / part / "config.json").read_text()) for part in parts}
    (nodes / "tiny/sizes.json").write_text(json.dumps(sizes))
    start = "from .tiny_sizes import register\n\nregister()\nNODE_CLASS_MAPPINGS = {}\n"
    (nodes / "tiny/__init__.py").write_text(start)
    strip_header(checkpoints / "flow.safetensors", checkpoints / "unknown.safetensors")
    return base


def strip_header(file, out):
    """A copy without metadata, as other programs write a flow model."""
    from safetensors.numpy import load_file, save_file

    save_file(load_file(file), out)


def without_sampling(prompt):
    """The graph without the node behind the loader."""
    prompt = json.loads(json.dumps(prompt))
    for number, node in list(prompt.items()):
        if node["class_type"].startswith("ModelSampling"):
            relink(prompt, [number, 0], node["inputs"]["model"])
            del prompt[number]
    return prompt


def with_loader(prompt, file, shift=0.0):
    """The graph with our loader in place of ComfyUI's and of the node behind it."""
    prompt = without_sampling(prompt)
    for node in prompt.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node["class_type"] = "LoadRectiflowCheckpoint"
            node["inputs"] = {"ckpt_name": file, "shift": shift}
    return prompt


def relink(prompt, old, new):
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if value == old:
                node["inputs"][name] = new


def recognised(comparison):
    """What ComfyUI takes a file for, without a node and with our loader."""
    for parameterization in cases.PARAMETERIZATIONS:
        case = cases.Case("loader", "", [f"--shift={SHIFT}"], parameterization)
        out, answer = comparison.draw(case, 900)
        files = [out / image for image in answer["samples"][0]["images"]]
        prompt, _ = graphs(files[0])
        file = f"{parameterization}.safetensors"
        distance = drawn_as(comparison, without_sampling(prompt), files)
        why = ["no tensor and no key says flow to ComfyUI"] if parameterization == "flow" else []
        comparison.add("loader", f"{parameterization}, Load Checkpoint alone", distance, why)
        distance = drawn_as(comparison, with_loader(prompt, file), files)
        name = f"{parameterization}, Load rectiflow checkpoint"
        comparison.add("loader", name, distance, [])
        if parameterization == "flow":
            distance = drawn_as(comparison, with_loader(prompt, file, float(SHIFT)), files)
            comparison.add("loader", "flow, Load rectiflow checkpoint, shift set", distance, [])
            distance = drawn_as(comparison, with_loader(prompt, "unknown.safetensors"), files)
            why = ["a header that says nothing is refused with its key"]
            comparison.add("loader", "flow without a header", distance, why)


def drawn_as(comparison, prompt, files):
    drawn = comparison.server.draw(prompt)
    return drawn if isinstance(drawn, str) else levels(files, drawn)


def object_info(server):
    """What ComfyUI says of the nodes we use, without this machine's files."""
    found = {}
    for name in sorted(OWN_NODES):
        info = server.get(f"/object_info/{name}")[name]
        inputs = {}
        for group in ("required", "optional"):
            for field, kind in info["input"].get(group, {}).items():
                inputs[field] = described(field, kind)
        order = [field for group in info["input_order"].values() for field in group]
        found[name] = {
            "inputs": inputs,
            "order": [field for field in order if field in inputs],
            "output": info["output"],
            "output_name": info["output_name"],
        }
    return found


def described(field, kind):
    """Type or choices of an input, and its limits."""
    keep = {"min", "max", "multiline", "dynamicPrompts", "control_after_generate"}
    options = kind[1] if len(kind) > 1 else {}
    kept = {key: value for key, value in options.items() if key in keep}
    return {"type": [] if field == "ckpt_name" else kind[0], **kept}


def dropped(comparison, page, pictures, work):
    """What the page sends of each picture, and of sheets."""
    for name, picture in pictures:
        prompt, workflow = graphs(picture)
        found = differences(prompt, page.drop(picture))
        named = [text for text in workflow["extra"]["rectiflow"]["differences"] if "page" in text]
        distance = "; ".join(found) if found else (0, 0.0)
        comparison.add("page", name, distance, named)
    sheet_of_one(comparison, page, work)
    sheet_of_several(comparison, page, work)


def sheet_of_one(comparison, page, work):
    """A sheet of one prompt, two pictures: its graph is that of the pictures."""
    case = cases.Case("page", "grid.png", ["--batch=2"], prompts=("a {red} (apple)",))
    out, answer = comparison.draw(case, 901)
    picture = out / answer["samples"][0]["images"][0]
    found = differences(graphs(picture)[0], page.drop(out / "grid.png"))
    page.look(work / "page-grid.png")
    comparison.add("page", "grid.png of one prompt", "; ".join(found) or (0, 0.0), [])


def sheet_of_several(comparison, page, work):
    """A sheet of several prompts: the page opens no graph, and no program finds a recipe."""
    case = cases.Case("page", "grid.png", [], prompts=("an apple", "a pear"))
    out, _ = comparison.draw(case, 902)
    graph = page.drop(out / "grid.png")
    page.look(work / "page-grid-of-several.png")
    texts = set(Image.open(out / "grid.png").text) & {"parameters", "prompt", "workflow"}
    words = f"{len(graph)} nodes, {sorted(texts)}" if graph or texts else (0, 0.0)
    comparison.add("page", "grid.png of several prompts", words, [])


def summary(rows):
    """A table by kind."""
    lines = ["| what | cases | equal | named | broken | largest difference of equals |"]
    lines.append("|---|---|---|---|---|---|")
    for kind in dict.fromkeys(row[0] for row in rows):
        of_kind = [row for row in rows if row[0] == kind]
        counts = [sum(row[2].startswith(word) for row in of_kind) for word in VERDICTS]
        equal = [row[3][0] for row in of_kind if row[2].startswith("equal")]
        largest = max(equal, default="-")
        cells = [kind, len(of_kind), *counts, largest]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def about(args, page):
    """Versions, machine and date."""
    git = ["git", "-C", str(args.comfyui), "log", "-1", "--format=%H, %cs"]
    commit = args.commit or output(git).strip()
    packages = ("torch", "transformers", "comfyui-frontend-package", "playwright")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    fields = dict(line.split(":", 1) for line in output(["lscpu"]).splitlines() if ":" in line)
    machine = f"{fields.get('Model name', platform.machine()).strip()}, {fields['CPU(s)'].strip()}"
    version = (args.comfyui / "comfyui_version.py").read_text().split('"')[-2]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        f"ComfyUI {version} (commit {commit}), {', '.join(versions)}, Chromium {page.version}, "
        f"Python {platform.python_version()}; {machine} CPUs, {today}."
    )


def output(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def detail(rows):
    """Every case that is not plainly equal."""
    lines = []
    for kind, name, verdict, distance, named in rows:
        if verdict != "equal":
            reasons = "; ".join(named) or "-"
            lines.append(f"{kind}: {name}: {verdict}: {shown(distance)}\n    {reasons}")
    return lines


def write_page(path, lines):
    """Replaces the table between the marks."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=pathlib.Path)
    parser.add_argument("--base", type=pathlib.Path, default=pathlib.Path("runs/demo/base"))
    parser.add_argument("--flow", type=pathlib.Path, help="a flow model; default: the base")
    parser.add_argument("--program", type=pathlib.Path, default="target/release/rectiflow")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/peers-comfy"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--commit", help="ComfyUI's, if the folder is no git work tree")
    parser.add_argument("--port", type=int, default=8189)
    parser.add_argument("--only", help="a kind of case")
    parser.add_argument("--page", type=pathlib.Path, help="the document with the marks")
    parser.add_argument("--details", type=pathlib.Path, help="the file for all that is not equal")
    parser.add_argument("--object-info", type=pathlib.Path, help="the fixture to write")
    args = parser.parse_args()
    args.flow = args.flow or args.base
    return args


def run(args, server):
    comparison = Comparison(args, server)
    pictures = []
    chosen = [case for case in cases.cases() if args.only in (None, case.kind)]
    for number, case in enumerate(chosen):
        files = comparison.compare(case, number)
        if case.kind in ("text", "negative text", "value", "guidance"):
            pictures.append((f"{case.kind} {case.name}", files[0]))
    recognised(comparison)
    if args.object_info:
        text = json.dumps(object_info(server), indent=1, sort_keys=True)
        args.object_info.write_text(text + "\n")
    with Page(server.url, args.chromium) as page:
        dropped(comparison, page, pictures, args.work)
        return comparison.rows, about(args, page)


def main():
    args = arguments()
    base = prepare(args)
    with Server(sys.executable, args.comfyui.resolve(), base, args.port) as server:
        rows, said = run(args, server)
    lines = [said, "", *summary(rows)]
    print("\n".join(lines))
    if args.page:
        write_page(args.page, lines)
    if args.details:
        args.details.write_text("\n".join([said, "", *detail(rows)]) + "\n")
    if any(row[2] == "BROKEN" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
