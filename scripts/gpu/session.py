"""One session on a machine with a GPU: commands with a time limit, the card's memory, the results,
the page."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import threading
import time


class Card:
    """The largest memory in use on the card while a command ran, by nvidia-smi; in GiB."""

    QUERY = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")

    def __init__(self, is_there):
        self.is_there = is_there
        self.values = []

    def __enter__(self):
        self.values = []
        if self.is_there:
            command = [*self.QUERY, "--id=0", "--loop-ms=100"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self.thread = threading.Thread(target=self.read, daemon=True)
            self.thread.start()
        return self

    def read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.values.append(int(line))

    def __exit__(self, *_):
        if self.is_there:
            self.process.terminate()
            self.process.wait()
            self.thread.join(timeout=1)

    @property
    def gib(self):
        return max(self.values) / 1024 if self.values else None


class Session:
    """Runs commands, keeps their results, and writes the page after each."""

    def __init__(self, args, out, work):
        self.args, self.out, self.work = args, out, work
        self.began = time.monotonic()
        self.sections = []
        self.checks = []
        self.facts = {}
        self.environment = dict(os.environ, HF_HUB_OFFLINE="1")
        self.environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self.card = Card(args.device.startswith("cuda"))
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def remaining(self):
        return 60 * self.args.minutes - (time.monotonic() - self.began)

    def call(self, name, command, limit, environment=()):
        """Runs a program. Returns the JSON of its last line, or {"error": ...}; with wall seconds
        and the card's memory. Everything is written down, whatever happens."""
        words = [str(word) for word in command]
        limit = min(limit, self.remaining())
        if limit < 1:
            return {"error": "not run: no time left", "wall_secs": 0, "card_gib": None}
        began = time.monotonic()
        with self.card as card:
            found = self.answer(words, limit, {**self.environment, **dict(environment)})
        found |= {"wall_secs": time.monotonic() - began, "card_gib": card.gib}
        record = {"name": name, "command": words, "environment": dict(environment), **found}
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{time.monotonic() - self.began:6.1f} s  {name}: {summary(found)}", flush=True)
        return found

    def answer(self, words, limit, environment):
        try:
            done = subprocess.run(
                words, check=False, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {limit:.0f} s"}
        except OSError as error:
            return {"error": f"{words[0]}: {error.strerror}"}
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        if done.returncode != 0:
            said = found.get("error") or first_line(done.stderr)
            found = {"error": " ".join(str(said).split())[:300], "exit": done.returncode}
        return found

    def table(self, title, heads, text=""):
        """Begins a table of the page."""
        section = {"title": title, "heads": heads, "rows": [], "text": text}
        self.sections.append(section)
        return section

    def row(self, section, *cells):
        section["rows"].append([str(cell) for cell in cells])
        self.write_page()

    def check(self, name, found, limit):
        """A check passes if `found` is a number of at most `limit`."""
        passed = isinstance(found, float | int) and found <= limit
        self.checks.append((name, found, limit, passed))
        self.write_page()
        return passed

    def write_page(self):
        lines = ["# Rectiflow on a GPU", ""]
        lines += [f"- {key}: {value}" for key, value in self.facts.items()]
        failed = [name for name, _, _, passed in self.checks if not passed]
        lines += ["", f"{len(self.checks)} checks, {len(failed)} failed{': ' * bool(failed)}"]
        lines[-1] += "; ".join(failed)
        lines += ["", "## Checks", "", "| check | found | at most | |", "|---|---|---|---|"]
        for name, found, limit, passed in self.checks:
            said = f"{found:.2e}" if isinstance(found, float | int) else found
            lines.append(f"| {name} | {said} | {limit:.0e} | {'passed' if passed else 'FAILED'} |")
        for section in self.sections:
            lines += ["", f"## {section['title']}", ""]
            if section["text"]:
                lines += [section["text"], ""]
            lines.append("| " + " | ".join(section["heads"]) + " |")
            lines.append("|---" * len(section["heads"]) + "|")
            lines += ["| " + " | ".join(row) + " |" for row in section["rows"]]
        (self.out / "gpu.md").write_text("\n".join(lines) + "\n")


def first_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def summary(found):
    if "error" in found:
        return found["error"]
    return f"{found['wall_secs']:.1f} s"


def processor():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def today():
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
