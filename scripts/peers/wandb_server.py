"""A stand-in for the server of W&B on loopback, as far as `wandb sync` asks: it says yes to all and
keeps what it is sent.

Mutations of GraphQL: `upsertBucket` makes a run, `createRunFiles` answers with addresses that
files are put to. Lines of history and of other streams are posted to `/files/.../file_stream`.
"""

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Received:
    """What the server was sent."""

    def __init__(self):
        self.lock = threading.Lock()
        # Lines by the name of their stream, each a JSON object.
        self.lines = {}
        # Bytes by the name of their file.
        self.files = {}
        # The variables of each `upsertBucket`.
        self.buckets = []
        # What else was asked: method and path, or the operation of GraphQL.
        self.others = []
        # The exit code and whether the run is complete, if they were sent.
        self.end = None


def bucket(variables):
    """The answer to `upsertBucket`."""
    project = {
        "id": "project-id",
        "name": variables["project"],
        "entity": {"id": "entity-id", "name": "stand-in"},
    }
    run = {
        "id": "bucket-id",
        "name": variables["name"],
        "displayName": variables.get("displayName") or variables["name"],
        "description": None,
        "config": variables.get("config"),
        "sweepName": None,
        "project": project,
        "historyLineCount": 0,
    }
    return {"upsertBucket": {"bucket": run, "inserted": True}}


class Handler(BaseHTTPRequestHandler):
    """Answers `wandb sync`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing."""

    def body(self):
        """The bytes of the request."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def answer(self, value):
        """Answers with JSON."""
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def query(self, asked):
        """Answers a query of GraphQL."""
        received, variables = self.server.received, asked.get("variables") or {}
        if "upsertBucket(" in asked["query"]:
            received.buckets.append(variables)
            return bucket(variables)
        if "createRunFiles(" in asked["query"]:
            base = f"http://127.0.0.1:{self.server.server_port}/put/"
            files = [{"name": name, "uploadUrl": base + name} for name in variables["files"]]
            answer = {"runID": "bucket-id", "uploadHeaders": [], "files": files}
            return {"createRunFiles": answer}
        received.others.append(asked.get("operationName") or asked["query"][:80])
        return {}

    def stream(self, sent):
        """Keeps the lines of a request; each stream says at which line its part begins."""
        received = self.server.received
        for name, part in (sent.get("files") or {}).items():
            lines = received.lines.setdefault(name, [])
            lines[part["offset"] :] = [json.loads(line) for line in part["content"]]
        if "exitcode" in sent or "complete" in sent:
            received.end = (sent.get("exitcode"), sent.get("complete"))

    def do_POST(self):
        """Queries and lines."""
        body = self.body()
        with self.server.received.lock:
            if self.path == "/graphql":
                self.answer({"data": self.query(json.loads(body))})
            elif self.path.endswith("/file_stream"):
                self.stream(json.loads(body))
                self.answer({})
            else:
                # Telemetry of the program itself, for one.
                self.server.received.others.append(f"POST {self.path}")
                self.answer({})

    def do_PUT(self):
        """Files."""
        body = self.body()
        with self.server.received.lock:
            self.server.received.files[self.path.removeprefix("/put/")] = body
        self.answer({})

    def do_GET(self):
        """Anything else."""
        with self.server.received.lock:
            self.server.received.others.append(f"GET {self.path}")
        self.answer({})


class Server(ThreadingHTTPServer):
    """Does not report that a client has closed its connection."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve():
    """Starts a server on a free port; returns it. `received` is what it was sent."""
    server = Server(("127.0.0.1", 0), Handler)
    server.received = Received()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
