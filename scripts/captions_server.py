#!/usr/bin/env python3
"""A captioning model made of templates, behind OpenAI's chat requests: for scripts/captions_use.sh.

    python3 scripts/captions_server.py PORT_FILE

Writes its port on the loopback interface to PORT_FILE and serves until it is ended. It looks at the
pixels that it is sent: the colour of the border, the colours of what differs from it, as a whole
and by halves, and the size and the shape of that. The name of the subject it takes from the prompt,
which has the picture's own caption in it; the prompt also says which of three kinds of caption it
wants. All three end in the background, "on a white background". Needs NumPy and Pillow.
"""

import base64
import http.server
import io
import json
import pathlib
import re
import sys

import numpy as np
from PIL import Image

MODEL = "templates"
SIDE_PX = 64
# The backgrounds of the demo's pictures (crates/rectiflow-data/examples/emoji_pictures.rs).
BACKGROUNDS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (200, 40, 40),
    "yellow": (245, 205, 60),
    "green": (60, 150, 80),
    "blue": (50, 90, 200),
    "purple": (120, 60, 160),
}
COLOURS = {
    "black": (25, 25, 25),
    "gray": (130, 130, 130),
    "white": (240, 240, 240),
    "red": (200, 40, 50),
    "orange": (240, 130, 40),
    "yellow": (250, 205, 60),
    "green": (70, 150, 70),
    "turquoise": (60, 170, 180),
    "blue": (50, 100, 210),
    "purple": (130, 80, 180),
    "pink": (240, 130, 170),
    "brown": (120, 75, 50),
    "beige": (240, 205, 160),
}
# A pixel is of the subject if a channel differs from the border by more.
SUBJECT_DIFFERENCE = 40
# The smallest share of the subject that is worth a word.
COLOUR_SHARE = 0.15
# How the prompts of scripts/captions_use.sh begin.
STARTS = {"short": "A short caption", "phrases": "A caption in phrases", "long": "A long caption"}
NAME = re.compile(r"a 3D emoji of (.+) on a \w+ background")
PICTURE = re.compile(r"data:image/jpeg;base64,(.+)", re.DOTALL)


def nearest(pixels, palette):
    """The index of the nearest colour of a palette, for each pixel."""
    colours = np.array(list(palette.values()), np.float32)
    return ((pixels[:, None] - colours) ** 2).sum(-1).argmin(1)


def main_colours(pixels):
    """The names of the colours with the largest shares, at most three."""
    counts = np.bincount(nearest(pixels, COLOURS), minlength=len(COLOURS))
    names = list(COLOURS)
    order = [int(at) for at in np.argsort(-counts, kind="stable")[:3]]
    return [names[at] for at in order if at == order[0] or counts[at] >= COLOUR_SHARE * len(pixels)]


class Look:
    """What the pixels of a picture show."""

    def __init__(self, jpeg):
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        aspect = image.width / image.height
        pixels = np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), np.float32)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        border = np.median(edge, 0)
        self.background = list(BACKGROUNDS)[nearest(border[None], BACKGROUNDS)[0]]
        mask = np.abs(pixels - border).max(-1) > SUBJECT_DIFFERENCE
        if not mask.any():
            mask[:] = True
        rows, columns = np.nonzero(mask)
        top, bottom = rows.min(), rows.max() + 1
        left, right = columns.min(), columns.max() + 1
        self.colours = main_colours(pixels[mask])
        middle = (top + bottom + 1) // 2, (left + right + 1) // 2
        self.upper = self.of_part(pixels[: middle[0]], mask[: middle[0]])
        self.lower = self.of_part(pixels[middle[0] :], mask[middle[0] :])
        self.left = self.of_part(pixels[:, : middle[1]], mask[:, : middle[1]])
        self.right = self.of_part(pixels[:, middle[1] :], mask[:, middle[1] :])
        shape = (right - left) / (bottom - top) * aspect
        self.shape = "tall" if shape < 0.8 else "wide" if shape > 1.25 else "as wide as tall"
        self.filling = mask.sum() / ((bottom - top) * (right - left))
        self.share = (bottom - top) * (right - left) / SIDE_PX**2

    def of_part(self, pixels, mask):
        """The main colour of a part, or of the whole subject if it has nothing of it."""
        return main_colours(pixels[mask])[0] if mask.any() else self.colours[0]

    def outline(self):
        if self.filling > 0.85:
            return "solid"
        return "round" if self.filling > 0.65 else "slender"

    def size(self):
        return "large" if self.share > 0.45 else "medium" if self.share > 0.25 else "small"


def caption(kind, name, look):
    """A caption of the kind that was asked for."""
    end = f"on a {look.background} background"
    if kind == "short":
        return f"{name} {end}"
    if kind == "phrases":
        phrases = [name, *look.colours, look.shape, look.outline(), look.size()]
        return ", ".join([*phrases, end])
    others = look.colours[1:]
    some = f" with some {' and some '.join(others)}" if others else ""
    return (
        f"A 3D emoji of {name}. The {name} is mostly {look.colours[0]}{some}. Its upper half is "
        f"{look.upper} and its lower half is {look.lower}, its left side is {look.left} and its "
        f"right side is {look.right}. It is {look.shape}, {look.outline()} and {look.size()}, and "
        f"stands in the middle, {end}"
    )


def answer(request):
    """The text for a chat request."""
    parts = request["messages"][-1]["content"]
    if isinstance(parts, str):
        return "There is no picture."
    prompt = " ".join(part["text"] for part in parts if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    look = Look(base64.b64decode(PICTURE.fullmatch(urls[0])[1]))
    kinds = [kind for kind, start in STARTS.items() if prompt.startswith(start)]
    found = NAME.search(prompt)
    return caption((kinds or ["long"])[0], found[1] if found else "something", look)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def send(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": MODEL}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": answer(request)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.send(200, {"object": "chat.completion", "model": MODEL, "choices": [choice]})

    def log_message(self, *_):
        """A line for each of thousands of requests helps nobody."""


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # A name that appears with its content.
    path = pathlib.Path(sys.argv[1])
    partial = path.with_suffix(".partial")
    partial.write_text(str(server.server_address[1]))
    partial.rename(path)
    server.serve_forever()


if __name__ == "__main__":
    main()
