"""Two ranks in two network namespaces, with latency and loss between them: two machines on one.

    python3 scripts/ranks/two_nodes.py RECTIFLOW [--delay-ms 20] [--loss 0.01]

1. The run finishes and equals, bit for bit, the one that two ranks on one machine make.
2. The link is cut in the middle of a step: both ranks end within the time-out, with one line each.

Requires root and `ip`; where namespaces are not allowed, the script says so and ends with exit code
0 without testing anything. Delay and loss come from the kernel (`tc netem`); where it has none,
this script carries the packets, and delays and drops them itself.
"""

import argparse
import contextlib
import fcntl
import heapq
import os
import pathlib
import random
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time

from small_run import SmallRun, check

TIMEOUT_SECS = 5
# Beyond the time-out: what a busy machine may need to notice, and to end.
GRACE_SECS = 60
NUM_STEPS = 10
NODES = ["rectiflow-a", "rectiflow-b"]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]
# From linux/if_tun.h.
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def sh(command):
    return subprocess.run(command.split(), capture_output=True, text=True, check=False)


def must(command):
    done = sh(command)
    if done.returncode != 0:
        raise OSError(f"{command}: {done.stderr.strip()}")


def open_tap(name):
    """A TAP device whose frames have no header of the driver's."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


class Carrier(threading.Thread):
    """Carries Ethernet frames between two TAP devices; delays all and drops some."""

    def __init__(self, delay_secs, loss):
        super().__init__(daemon=True)
        self.delay_secs, self.loss = delay_secs, loss
        self.taps = [open_tap(f"rf-tap{index}") for index in range(2)]
        self.dice = random.Random(1)
        # A heap of (time, tie breaker, receiver, frame).
        self.due = []

    def run(self):
        while True:
            wait = max(0.0, self.due[0][0] - time.monotonic()) if self.due else 1.0
            for tap in select.select(self.taps, [], [], wait)[0]:
                self.receive(tap)
            while self.due and self.due[0][0] <= time.monotonic():
                _, _, receiver, frame = heapq.heappop(self.due)
                # If the link is down, the frame is lost.
                with contextlib.suppress(OSError):
                    os.write(self.taps[receiver], frame)

    def receive(self, tap):
        try:
            frame = os.read(tap, 65536)
        except OSError:
            # The link is down.
            time.sleep(0.01)
            return
        if self.dice.random() >= self.loss:
            arrival = time.monotonic() + self.delay_secs
            receiver = 1 - self.taps.index(tap)
            heapq.heappush(self.due, (arrival, self.dice.random(), receiver, frame))


class Nodes:
    """Two namespaces with a link between them."""

    def __init__(self, delay_ms, loss):
        self.links = []
        for node in NODES:
            must(f"ip netns add {node}")
            must(f"ip -n {node} link set lo up")
        if self.has_netem():
            self.links = ["rf-veth0", "rf-veth1"]
            self.link_by_netem(delay_ms, loss)
            self.how = "tc netem"
        else:
            self.links = ["rf-tap0", "rf-tap1"]
            self.link_by_carrier(delay_ms, loss)
            self.how = "this script, the kernel has no netem"
        for node, link, address in zip(NODES, self.links, ADDRESSES, strict=True):
            must(f"ip -n {node} addr add {address}/24 dev {link}")
            must(f"ip -n {node} link set {link} up")

    def link_by_netem(self, delay_ms, loss):
        first, second = self.links
        must(f"ip link add {first} netns {NODES[0]} type veth peer name {second} netns {NODES[1]}")
        netem = f"netem delay {delay_ms}ms loss {100 * loss}%"
        for node, link in zip(NODES, self.links, strict=True):
            must(f"ip netns exec {node} tc qdisc add dev {link} root {netem}")

    def link_by_carrier(self, delay_ms, loss):
        carrier = Carrier(delay_ms / 1000, loss)
        for node, link in zip(NODES, self.links, strict=True):
            must(f"ip link set {link} netns {node}")
        carrier.start()

    @staticmethod
    def has_netem():
        must(f"ip link add rf-try0 netns {NODES[0]} type veth peer name rf-try1 netns {NODES[1]}")
        tried = sh(f"ip netns exec {NODES[0]} tc qdisc add dev rf-try0 root netem delay 1ms")
        must(f"ip -n {NODES[0]} link del rf-try0")
        return tried.returncode == 0

    def cut(self):
        must(f"ip -n {NODES[1]} link set {self.links[1]} down")

    @staticmethod
    def remove():
        for node in NODES:
            sh(f"ip netns del {node}")


def start(run, recipe, host, nodes):
    """Starts both ranks, each in a namespace of `nodes`, or on this machine without."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = []
    for rank in range(2):
        where = ["ip", "netns", "exec", nodes[rank]] if nodes else []
        process = subprocess.Popen(
            [*where, run.rectiflow, "train", str(recipe)],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ranks.append(process)
    return ranks


def finish(ranks):
    """The exit codes and error outputs of all ranks."""
    errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], errors


def weights(run, name):
    """The newest checkpoint's tensor files, as (name, bytes)."""
    checkpoint = max((run.folder / name / "checkpoints").iterdir())
    files = sorted(path for path in checkpoint.rglob("*.safetensors"))
    return [(path.relative_to(checkpoint), path.read_bytes()) for path in files]


def check_same_run(run):
    for name, host, nodes in [("near", "127.0.0.1", None), ("far", ADDRESSES[0], NODES)]:
        began = time.monotonic()
        codes, errors = finish(start(run, run.recipe(name, NUM_STEPS), host, nodes))
        secs = time.monotonic() - began
        check(codes == [0, 0], f"{name}: ten steps of two ranks, {secs:.1f} s", errors)
    near, far = ([step["loss"] for step in run.events(name, "step")] for name in ("near", "far"))
    is_equal = near == far and len(near) == NUM_STEPS
    check(is_equal, "every loss is equal, bit for bit", (near, far))
    check(weights(run, "near") == weights(run, "far"), "and every weight and moment", "they differ")


def check_cut_link(run, link):
    recipe = run.recipe("cut", 4000, f"[ranks]\ntimeout_secs = {TIMEOUT_SECS}\n")
    ranks = start(run, recipe, ADDRESSES[0], NODES)
    run.wait_for_steps("cut", 5, ranks, patience_secs=300)
    link.cut()
    began = time.monotonic()
    codes, errors = finish(ranks)
    secs = time.monotonic() - began
    check(codes == [1, 1], "with the link cut both ranks end with exit code 1", (codes, errors))
    limit = f"within the time-out of {TIMEOUT_SECS} s and the time to notice"
    check(secs < TIMEOUT_SECS + GRACE_SECS, f"{limit}: {secs:.1f} s", secs)
    for rank, text in enumerate(errors):
        lines = [line for line in text.splitlines() if "error: " in line]
        names_other = len(lines) == 1 and f"rank {1 - rank}" in lines[0]
        check(names_other, f"rank {rank} reports the missing rank in one line", text)
        print(f"    {lines[0]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rectiflow")
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--loss", type=float, default=0.01)
    args = parser.parse_args()
    if shutil.which("ip") is None or shutil.which("tc") is None:
        print("skipped: `ip` and `tc` (iproute2) are not installed")
        return
    try:
        nodes = Nodes(args.delay_ms, args.loss)
    except OSError as reason:
        Nodes.remove()
        print(f"skipped: network namespaces are not allowed here ({reason})")
        return
    try:
        link = f"{args.delay_ms:g} ms and {args.loss:.1%} loss each way by {nodes.how}"
        print(f"two namespaces, {link}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run = SmallRun(folder, str(pathlib.Path(args.rectiflow).absolute()))
            check_same_run(run)
            check_cut_link(run, nodes)
    finally:
        Nodes.remove()


if __name__ == "__main__":
    main()
