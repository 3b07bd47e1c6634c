#!/usr/bin/env python3
"""Captions a few pictures with a real server, `transformers serve`, and says what came back.

    python3 scripts/peers/caption/serve.py FOLDER --program rectiflow \\
        --transformers ENV/bin/transformers

FOLDER has the models of tiny_vision.py. Checked are: the vision model passes the probe and each
picture gets a row; a second run asks nothing; the text model, of which the server drops pictures
silently, is found out by the probe before the first picture. Exits with 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import PIL.Image

NUM_PICTURES = 6


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def served(transformers, model, folder):
    """Serves a model; returns the URL before /chat/completions."""
    port = free_port()
    # An empty cache: the server lists the models in it.
    cache = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [transformers, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "serve.log", "a") as log:
        process = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, **cache}
        )
        try:
            end = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > end:
                        sys.exit(f"transformers serve did not start: {folder / 'serve.log'}")
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def write_pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(3)
    for number in range(NUM_PICTURES):
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(coarse).resize((200, 150), PIL.Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=95)


def caption(program, source, table, url, model):
    """Runs the program; returns its exit code, its answer and its messages."""
    sets = [
        f'caption.servers=["{url}"]',
        f"caption.model={model}",
        "caption.requests=2",
        'caption.modes=[{name="short",prompt="What is it?",max_tokens=40,temperature=0.0}]',
    ]
    command = [program, "--json", "caption", str(source), "--out", str(table)]
    for change in sets:
        command += ["--set", change]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", required=True)
    parser.add_argument("--transformers", required=True)
    args = parser.parse_args()
    source, table = args.folder / "pictures", args.folder / "captions.parquet"
    table.unlink(missing_ok=True)
    write_pictures(source)

    model = args.folder / "vision"
    with served(args.transformers, model, args.folder) as url:
        code, answer, messages = caption(args.program, source, table, url, model)
        if code != 0 or answer["rows"] != NUM_PICTURES:
            sys.exit(f"vision model: exit {code}, {answer}\n{messages}")
        statuses = answer["captions"]["statuses"]
        tokens = answer["captions"]["prompt_tokens"]
        print(f"vision model: {NUM_PICTURES} pictures, {statuses}, {tokens} tokens of prompts")
        print(messages.strip())
        code, answer, messages = caption(args.program, source, table, url, model)
        if code != 0 or answer["captions"]["total"] != 0:
            sys.exit(f"second run: exit {code}, {answer}\n{messages}")
        print("second run: asks nothing")

    model = args.folder / "text"
    with served(args.transformers, model, args.folder) as url:
        other = args.folder / "text.parquet"
        code, answer, messages = caption(args.program, source, other, url, model)
        if code != 1 or "does not see pictures" not in messages:
            sys.exit(f"text model: exit {code}, {answer}\n{messages}")
        print(f"text model: {messages.strip()}")


if __name__ == "__main__":
    main()
