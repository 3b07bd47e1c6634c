"""ComfyUI's page in headless Chromium: what it makes of a dropped picture."""

import base64
import json

SETTLES_MS = 1500
# A drop as a person's browser sends it, on the canvas.
DROP = """async ([name, data]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: 'image/png' }));
    const target = document.querySelector('#graph-canvas');
    const options = { bubbles: true, cancelable: true, dataTransfer: transfer };
    for (const kind of ['dragenter', 'dragover', 'drop'])
        target.dispatchEvent(new DragEvent(kind, options));
}"""
GRAPH = "async () => JSON.stringify((await window.app.graphToPrompt()).output)"
# An empty graph: a picture without one has to leave it so.
CLEAR = "() => window.app.graph.clear()"


class Page:
    """Use as a context."""

    def __init__(self, url, chromium):
        self.url = url
        self.chromium = chromium

    def __enter__(self):
        from playwright.sync_api import sync_playwright

        self.playwright = sync_playwright().start()
        arguments = ["--no-sandbox", "--disable-gpu"]
        self.browser = self.playwright.chromium.launch(
            executable_path=self.chromium, args=arguments
        )
        self.page = self.browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.goto(self.url)
        self.page.wait_for_function("window.app && window.app.graph", timeout=120_000)
        self.page.wait_for_timeout(2 * SETTLES_MS)
        # A new user is shown templates.
        self.page.keyboard.press("Escape")
        return self

    def __exit__(self, *_):
        self.browser.close()
        self.playwright.stop()

    @property
    def version(self):
        return self.browser.version

    def drop(self, picture):
        """The graph that the page would send after the drop, for the server."""
        self.page.evaluate(CLEAR)
        data = base64.b64encode(picture.read_bytes()).decode()
        self.page.evaluate(DROP, [picture.name, data])
        self.page.wait_for_timeout(SETTLES_MS)
        return self.graph()

    def graph(self):
        """The nodes with class and inputs, as in our `prompt`."""
        nodes = json.loads(self.page.evaluate(GRAPH))
        return {number: pick(node) for number, node in nodes.items()}

    def look(self, path):
        """Saves a picture of the page."""
        self.page.focus("#graph-canvas")
        self.page.keyboard.press(".")
        self.page.wait_for_timeout(SETTLES_MS)
        self.page.screenshot(path=path)


def pick(node):
    return {"class_type": node["class_type"], "inputs": node["inputs"]}


def differences(ours, theirs):
    """What the page would send otherwise, a few words each."""
    found = []
    for number in sorted({*ours, *theirs}, key=int):
        mine, other = ours.get(number), theirs.get(number)
        if mine is None or other is None:
            found.append(f"node {number} is missing")
            continue
        names = {*mine["inputs"], *other["inputs"]}
        for name in sorted(names):
            pair = mine["inputs"].get(name), other["inputs"].get(name)
            if pair[0] != pair[1]:
                found.append(f"{mine['class_type']}.{name}: {pair[1]!r} for {pair[0]!r}")
    return found
