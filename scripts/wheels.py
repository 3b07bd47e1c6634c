"""Libraries out of pinned wheels: what libtorch.py and onnx_runtime.py share.

A wheel is fetched with pip, and its SHA-256 is checked before any of its files are used. Progress
and errors go to standard error.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

# Any Python can fetch the cp312 wheels: only their shared libraries are used.
PYTHON_TAG = "3.12"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
CHOOSE_WHEEL = ["--only-binary=:all:", "--python-version", PYTHON_TAG]


def say(text):
    print(text, file=sys.stderr, flush=True)


def fail(text):
    say(f"error: {text}")
    sys.exit(1)


def cache_folder():
    """The folder of libraries, shared by all clones."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rectiflow"


def once(target, install):
    """Calls `install`, which makes `target`, unless it is there; of several processes one does."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            install()


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def find_wheel(folder, name, version):
    stem = f"{name.replace('-', '_')}-{version}-"
    return next((p for p in sorted(folder.glob("*.whl")) if p.name.startswith(stem)), None)


def download(wheel, folder, library, advice):
    """The checked wheel, (package, version, SHA-256); fetches it to `folder` unless it is there.

    `library` is what it is fetched for; `advice` says how to provide that without a download.
    """
    name, version, wanted_sha256 = wheel
    folder.mkdir(parents=True, exist_ok=True)
    if find_wheel(folder, name, version) is None:
        say(f"{library}: fetching {name} {version}")
        command = [*PIP, "download", "--no-deps", *CHOOSE_WHEEL, "-d", str(folder)]
        # pip's progress goes to standard error: standard output is the answer alone.
        answer = subprocess.run([*command, f"{name}=={version}"], stdout=sys.stderr, check=False)
        if answer.returncode != 0:
            fail(advice)
    path = find_wheel(folder, name, version)
    if path is None:
        fail(f"pip reported success but left no wheel of {name} {version} in {folder}")
    found = sha256(path)
    if found != wanted_sha256:
        path.unlink()
        fail(
            f"{path.name}: expected SHA-256 {wanted_sha256}, found {found}; "
            "removed it, run it again"
        )
    return path
