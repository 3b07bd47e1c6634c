#!/usr/bin/env python3
"""Looks at `rectiflow watch` through headless Chromium: loading, zoom, live steps, a phone.

    python3 scripts/watch_page.py [OUT] [--chromium PROGRAM]

Needs `make build`, the example `made_up_run` and a Chromium; it is not part of CI. Writes pictures
of the page to OUT (default runs/watch-page), light and dark, wide and as on a phone, and prints
what it has measured. The browser is spoken to through a pipe, so that no package is needed.
"""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip


def target():
    """The folder of built programs."""
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", "target")) / "release"


class Browser:
    """A page in a browser, driven by the DevTools protocol."""

    def __init__(self, program, profile):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=[to_browser, from_browser],
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.buffer = b""
        self.count = 0
        self.session = None
        self.requests = []
        self.errors = []
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=page, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        """The answer to a command; events in between are noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    sys.exit(f"{method}: {answer['error']}")
                return answer["result"]
            self.note(answer)

    def receive(self):
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 1 << 20)
            if not part:
                sys.exit("the browser has ended")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def note(self, event):
        """Keeps what was requested and what went wrong."""
        method, what = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(what["exceptionDetails"])[:600])
        elif method == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(what["entry"]["text"] + " " + what["entry"].get("url", ""))

    def value(self, expression):
        """The value of an expression in the page."""
        settings = {"returnByValue": True, "awaitPromise": True}
        found = self.ask("Runtime.evaluate", expression=expression, **settings)
        if "exceptionDetails" in found:
            sys.exit(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, expression, secs=10):
        """Waits until an expression is true; returns the seconds that took."""
        began = time.monotonic()
        while not self.value(expression):
            if time.monotonic() - began > secs:
                sys.exit(f"after {secs} s still false: {expression}\n{self.errors}")
            time.sleep(0.02)
        return time.monotonic() - began

    def size(self, width, height, is_phone=False):
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if is_phone else 1, mobile=is_phone,
        )  # fmt: skip

    def scheme(self, name):
        feature = {"name": "prefers-color-scheme", "value": name}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def shot(self, path, is_whole=True):
        time.sleep(0.4)
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def drag(self, x0, x1, y):
        """Drags the mouse from one place to another."""
        for kind, x in (("Pressed", x0), ("Moved", (x0 + x1) / 2), ("Moved", x1), ("Released", x1)):
            buttons = 0 if kind == "Released" else 1
            self.ask(
                "Input.dispatchMouseEvent",
                type=f"mouse{kind}", x=x, y=y, button="left", buttons=buttons, clickCount=1,
            )  # fmt: skip

    def move(self, x, y):
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def made_up(*arguments):
    subprocess.run([target() / "examples/made_up_run", *map(str, arguments)], check=True)


def serve(folder):
    """Starts the server; returns it with its address."""
    command = [target() / "rectiflow", "watch", folder, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if "watch at " in line:
            return server, line.split("watch at ")[1].split()[0]
    sys.exit("rectiflow watch has ended")


LOSS = "page.charts.find(c => c.spec.name === 'loss')"
NEWEST = "page.main().data.view.axis.step.at(-1)"
TRAINING = f"{LOSS}.series.find(s => s.label === 'training').points"
BOX = f"(b => [b.left, b.top, b.width, b.height])({LOSS}.area.getBoundingClientRect())"
READY = "document.documentElement?.dataset.ready"


def visit(browser, address):
    browser.ask("Page.navigate", url="about:blank")
    browser.ask("Page.navigate", url=address)
    browser.until(READY)


def long_run(browser, url, out):
    """40,000 steps, opened in a new page: every spike is drawn, and text stays text."""
    numbers = {}
    browser.ask("Page.navigate", url=url + "#run=long")
    browser.until(READY)
    numbers["40,000 steps drawn after (ms)"] = int(browser.value(READY))
    browser.ask("Page.reload")
    browser.until(READY)
    numbers["and again (ms)"] = int(browser.value(READY))
    numbers["bytes of its numbers"] = browser.value("JSON.stringify(page.main().data).length")
    spike = browser.value(f"Math.max(...{TRAINING}.hi)")
    assert spike == 7.9, f"the spike of 7.9 is not drawn: {spike}"
    assert browser.value("document.querySelector('#acts-list').children.length") == 3
    markup = "#acts-list b b, #tip b b, #acts-list script"
    assert not browser.value(f"document.querySelector('{markup}')")
    browser.until("document.querySelector('#previews img').naturalWidth > 0")
    browser.shot(out / "wide-light.png")
    return numbers


def zooming(browser, out):
    """Zoom by dragging, values under the mouse, and back."""
    left, top, width, height = browser.value(BOX)
    browser.drag(left + width * 0.35, left + width * 0.45, top + height / 2)
    browser.until(f"!{TRAINING}.hi || page.range()[0] > 1000")
    browser.until("!document.querySelector('#reset').hidden")
    time.sleep(1)
    span = browser.value("page.range()")
    assert 0.05 < (span[1] - span[0]) / 40000 < 0.2, span
    points = browser.value(f"{TRAINING}.s.length")
    browser.move(left + width * 0.5, top + height * 0.5)
    assert "step" in browser.value("document.querySelector('#tip').textContent")
    browser.shot(out / "zoomed.png", is_whole=False)
    browser.value("document.querySelector('#reset').click()")
    time.sleep(1)
    return {"points of the zoomed tenth": points}


def axes(browser, out):
    """By sample the undone steps are gone; by time and by step they are there."""
    count = f"{TRAINING}.n.reduce((a, b) => a + b, 0)"
    by_step = browser.value(count)
    choose = (
        "(a => {{ a.value = '{}'; a.dispatchEvent(new Event('change')); }})"
        "(document.querySelector('#axis'))"
    )
    browser.value(choose.format("samples"))
    browser.until(f"{count} < {by_step}")
    numbers = [by_step, browser.value(count)]
    browser.value(choose.format("time"))
    time.sleep(1)
    browser.shot(out / "by-time.png", is_whole=False)
    browser.value(choose.format("step"))
    browser.until(f"{count} === {by_step}")
    return {"steps, and without those that a rewind has undone": numbers}


def live_run(browser, url, folder, out):
    """How long a written step takes to be there; a rewind, and a process that begins again."""
    visit(browser, url + "#run=live")
    delays = []
    for _ in range(10):
        before = browser.value(NEWEST)
        made_up(folder / "live", "--live", 1, 0)
        delays.append(browser.until(f"{NEWEST} > {before}"))
    assert max(delays) < 1.0, delays

    made_up(folder / "live", "--rewind")
    acts = "document.querySelector('#acts-list').textContent"
    browser.until(f"{acts}.includes('<b>of 1e-9</b>')")
    newest = browser.value(NEWEST)
    made_up(folder / "live", "--resume", newest - 100)
    browser.until(f"{NEWEST} === {newest - 95}")
    steps = browser.value(f"{TRAINING}.s")
    assert steps == sorted(set(steps)), "steps that came again are there twice"
    browser.until(f"{acts}.includes('resume')")
    browser.shot(out / "live.png", is_whole=False)
    return {
        "a written step is drawn after (s, of ten)": [round(min(delays), 2), round(max(delays), 2)]
    }


def other_screens(browser, url, out):
    """Dark, several runs over each other, a phone."""
    browser.scheme("dark")
    visit(browser, url + "#run=long&run=other")
    browser.until("[...page.runs.values()].filter(r => r.data).length === 2")
    browser.shot(out / "wide-dark.png")
    for scheme in ("dark", "light"):
        browser.scheme(scheme)
        browser.size(390, 844, is_phone=True)
        visit(browser, url + "#run=ranks")
        wide = browser.value("document.documentElement.scrollWidth")
        assert wide <= 390, f"the page is {wide} pixels wide"
        browser.shot(out / f"phone-{scheme}.png")


def look(browser, url, folder, out):
    """All that is looked at; exits if something is not as it should be."""
    browser.size(1360, 900)
    browser.scheme("light")
    numbers = long_run(browser, url, out)
    numbers |= zooming(browser, out)
    numbers |= axes(browser, out)
    numbers |= live_run(browser, url, folder, out)
    other_screens(browser, url, out)

    # Nothing was asked of anybody else, and nothing failed.
    own = (url, "about:", "data:")
    others = {request for request in browser.requests if not request.startswith(own)}
    assert not others, others
    assert not browser.errors, browser.errors
    return numbers


def main():
    arguments = sys.argv[1:]
    program = shutil.which("chromium") or shutil.which("chromium-browser") or "google-chrome"
    if "--chromium" in arguments:
        at = arguments.index("--chromium")
        program = arguments[at + 1]
        del arguments[at : at + 2]
    out = pathlib.Path(arguments[0] if arguments else "runs/watch-page")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = pathlib.Path(scratch) / "runs"
        made_up(folder / "long", 40000)
        made_up(folder / "other", 12000, 9)
        made_up(folder / "ranks", 600, 3, 8)
        made_up(folder / "live", 400, 5)
        server, url = serve(folder)
        browser = Browser(program, pathlib.Path(scratch) / "profile")
        try:
            numbers = look(browser, url, folder, out)
        finally:
            browser.process.kill()
            browser.process.wait()
            server.terminate()
            server.wait()
    print(json.dumps(numbers, indent=1))
    print(f"pictures: {out}")


if __name__ == "__main__":
    main()
