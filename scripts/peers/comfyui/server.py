"""A ComfyUI server in a folder of its own: started, asked and stopped."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request

STARTS_WITHIN_SECS = 300
DRAWS_WITHIN_SECS = 600
# Every program rounds like rectiflow in fp32; samplers of ComfyUI are compared, not its dtypes.
OPTIONS = ["--cpu", "--force-fp32", "--fp32-vae", "--fp32-text-enc", "--disable-auto-launch"]


class Server:
    """Use as a context; `base` is the folder that holds models, custom nodes and output."""

    def __init__(self, python, comfyui, base, port):
        self.base = base
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            python,
            comfyui / "main.py",
            *OPTIONS,
            "--listen=127.0.0.1",
            f"--port={port}",
            f"--base-directory={base}",
            f"--database-url=sqlite:///{base}/comfyui.db",
        ]
        self.log = base / "server.log"

    def __enter__(self):
        environment = os.environ | {"TORCH_USE_RTLD_GLOBAL": "1", "DO_NOT_TRACK": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def wait(self):
        end = time.monotonic() + STARTS_WITHIN_SECS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"ComfyUI stopped while it started: {self.tail()}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        raise SystemExit(f"ComfyUI did not answer in {STARTS_WITHIN_SECS} s: {self.tail()}")

    def tail(self):
        return "\n".join(self.log.read_text().splitlines()[-20:])

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def draw(self, prompt):
        """The files of a graph's pictures, or the reason for which there are none."""
        body = json.dumps({"prompt": prompt}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + "/prompt", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            return refusal(json.load(error))
        end = time.monotonic() + DRAWS_WITHIN_SECS
        while time.monotonic() < end:
            history = self.get(f"/history/{number}")
            if number in history:
                return self.pictures(history[number])
            time.sleep(0.05)
        return f"no answer in {DRAWS_WITHIN_SECS} s"

    def pictures(self, history):
        if history["status"]["status_str"] != "success":
            messages = dict(history["status"]["messages"])
            error = messages.get("execution_error", {})
            return f"failed: {error.get('exception_message', '').strip()}"
        found = []
        for output in history["outputs"].values():
            for image in output.get("images", []):
                found.append(self.base / "output" / image["subfolder"] / image["filename"])
        return found


def refusal(answer):
    """The server's words about a graph that it does not run."""
    details = []
    for node in answer.get("node_errors", {}).values():
        details += [error["details"] for error in node["errors"]]
    return "refused: " + "; ".join(details or [answer["error"]["message"]])
