"""Draws the README's picture: prompts of the demo before and after its conversion to flow matching.

    python3 scripts/before_after.py runs/demo docs/before-after.png [--rectiflow PROGRAM]

Needs a finished `make demo` and Pillow (scripts/requirements-training.txt). Two models draw the
prompts of the recipe's previews with the recipe's settings, both sampled as flow from the same
noise: the base that the demo starts from, and the model that it ends with. The demo's folder is not
written to.
"""

import argparse
import pathlib
import subprocess
import tempfile
import tomllib

from PIL import Image, ImageDraw, ImageFont

PAIRS_A_ROW = 3
PICTURE_PX = 128
# Between the pictures of a pair, between pairs, around all.
GAP_PX, SPACE_PX, MARGIN_PX = 4, 22, 8
FONT_PX, LINE_PX = 13, 17
INK, SOFT_INK, PAPER = "#1f2328", "#59636e", "#ffffff"


def draw(rectiflow, model, preview, folder):
    """Returns the pictures of the preview's prompts by a model, sampled as flow."""
    sample = preview["sample"]
    command = [rectiflow, "sample", "--model", model, "--parameterization", "flow", "--out", folder]
    command += ["--size", f"{sample['width_px']}x{sample['height_px']}"]
    for name in ["steps", "shift", "cfg", "seed"]:
        command += [f"--{name}", str(sample[name])]
    for prompt in preview["prompts"]:
        command += ["--prompt", prompt]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [Image.open(path) for path in sorted(folder.glob("[0-9]*.png"))]


def newest_checkpoint(run):
    checkpoints = sorted((run / "checkpoints").glob("step-*[0-9]"))
    if not checkpoints:
        raise SystemExit(f"{run} has no checkpoint: run make demo first")
    return checkpoints[-1]


def lines_of(prompt):
    """Returns a prompt as two lines, parted before its background."""
    subject, _, background = prompt.partition(" on a ")
    return [subject, f"on a {background}"]


def page(before, after, prompts):
    """Returns all pairs as one picture, a caption under each."""
    pair_px = 2 * PICTURE_PX + GAP_PX
    cell_px = PICTURE_PX + 3 * LINE_PX + 6
    rows = -(-len(prompts) // PAIRS_A_ROW)
    width = 2 * MARGIN_PX + PAIRS_A_ROW * pair_px + (PAIRS_A_ROW - 1) * SPACE_PX
    height = 2 * MARGIN_PX + rows * cell_px + (rows - 1) * SPACE_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for index, prompt in enumerate(prompts):
        left = MARGIN_PX + index % PAIRS_A_ROW * (pair_px + SPACE_PX)
        top = MARGIN_PX + index // PAIRS_A_ROW * (cell_px + SPACE_PX)
        right = left + PICTURE_PX + GAP_PX
        for pictures, name, x in [(before, "before", left), (after, "after", right)]:
            sheet.paste(pictures[index], (x, top))
            middle = x + PICTURE_PX / 2, top + PICTURE_PX + 2
            pen.text(middle, name, SOFT_INK, font, anchor="ma")
        for number, line in enumerate(lines_of(prompt)):
            middle = left + pair_px / 2, top + PICTURE_PX + 4 + LINE_PX * (number + 1)
            pen.text(middle, line, INK, font, anchor="ma")
    return sheet


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--rectiflow", default="target/release/rectiflow")
    args = parser.parse_args()
    preview = tomllib.loads(pathlib.Path("recipes/demo.toml").read_text())["preview"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        before = draw(args.rectiflow, args.run / "base", preview, folder / "before")
        after = draw(args.rectiflow, newest_checkpoint(args.run), preview, folder / "after")
        page(before, after, preview["prompts"]).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
