"""Two ranks in two network namespaces, with latency and loss between them: a rehearsal of two machines on one.

    python3 scripts/ranks/two_nodes.py RECTIFLOW [--delay-ms 20] [--loss 0.01]

1. The run is finished, and is the one that two ranks on one machine make, bit for bit.
2. The link is cut in the middle of a step: both ranks end within the time-out with one line.

It needs root and `ip`; where namespaces are not allowed it says so and ends with 0, having tested
nothing. Delay and loss come from the kernel (`tc netem`); where it has none, the packets are
carried by this script, which delays and drops them.
"""

import argparse
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
import sys
import tempfile
import threading
import time

from small_run import SmallRun, check

TIMEOUT_SECS = 5
# What a busy machine may need beyond the time-out to look, and to end.
GRACE_SECS = 60
NODES = ["rectiflow-a", "rectiflow-b"]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]


def sh(command):
    return subprocess.run(command.split(), capture_output=True, text=True)


def must(command):
    done = sh(command)
    if done.returncode != 0:
        raise OSError(f"{command}: {done.stderr.strip()}")


class Carrier(threading.Thread):
    """Carries Ethernet frames between two TAP devices, later than they came, and loses some."""

    def __init__(self, delay_secs, loss):
        super().__init__(daemon=True)
        self.delay_secs, self.loss = delay_secs, loss
        self.taps = [self.tap(f"rf-tap{index}") for index in range(2)]

    @staticmethod
    def tap(name):
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(
            tap, 0x400454CA, struct.pack("16sH", name.encode(), 0x0002 | 0x1000)
        )  # TUNSETIFF: TAP, no header
        return tap

    def run(self):
        dice, due = random.Random(1), []
        while True:
            wait = max(0.0, due[0][0] - time.monotonic()) if due else 1.0
            for tap in select.select(self.taps, [], [], wait)[0]:
                try:
                    frame = os.read(tap, 65536)
                except OSError:
                    time.sleep(0.01)  # the link is down
                    continue
                if dice.random() >= self.loss:
                    heapq.heappush(
                        due,
                        (
                            time.monotonic() + self.delay_secs,
                            dice.random(),
                            1 - self.taps.index(tap),
                            frame,
                        ),
                    )
            while due and due[0][0] <= time.monotonic():
                _, _, to, frame = heapq.heappop(due)
                try:
                    os.write(self.taps[to], frame)
                except OSError:
                    pass  # the link is down: one more that is lost


class Nodes:
    """Two namespaces with a link between them."""

    def __init__(self, delay_ms, loss):
        self.links = []
        for node in NODES:
            must(f"ip netns add {node}")
            must(f"ip -n {node} link set lo up")
        if self.has_netem():
            must(
                f"ip link add rf-veth0 netns {NODES[0]} type veth peer name rf-veth1 netns {NODES[1]}"
            )
            self.links = ["rf-veth0", "rf-veth1"]
            for node, link in zip(NODES, self.links):
                must(
                    f"ip netns exec {node} tc qdisc add dev {link} root netem delay {delay_ms}ms loss {100 * loss}%"
                )
            self.how = "tc netem"
        else:
            carrier = Carrier(delay_ms / 1000, loss)
            self.links = ["rf-tap0", "rf-tap1"]
            for node, link in zip(NODES, self.links):
                must(f"ip link set {link} netns {node}")
            carrier.start()
            self.how = "this script, the kernel has no netem"
        for node, link, address in zip(NODES, self.links, ADDRESSES):
            must(f"ip -n {node} addr add {address}/24 dev {link}")
            must(f"ip -n {node} link set {link} up")

    @staticmethod
    def has_netem():
        must(f"ip link add rf-try0 netns {NODES[0]} type veth peer name rf-try1 netns {NODES[1]}")
        found = (
            sh(f"ip netns exec {NODES[0]} tc qdisc add dev rf-try0 root netem delay 1ms").returncode
            == 0
        )
        must(f"ip -n {NODES[0]} link del rf-try0")
        return found

    def cut(self):
        must(f"ip -n {NODES[1]} link set {self.links[1]} down")

    @staticmethod
    def remove():
        for node in NODES:
            sh(f"ip netns del {node}")


def start(run, recipe, host, nodes):
    """Both ranks, in a namespace each or on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        launch = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": 0,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        environment = (
            os.environ
            | {name: str(value) for name, value in launch.items()}
            | {"OMP_NUM_THREADS": "1"}
        )
        where = ["ip", "netns", "exec", nodes[rank]] if nodes else []
        command = [*where, run.rectiflow, "train", str(recipe)]
        ranks.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return ranks


def finish(ranks):
    errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], errors


def weights(run, name):
    checkpoint = max((run.folder / name / "checkpoints").iterdir())
    files = sorted(path for path in checkpoint.rglob("*.safetensors"))
    return [(path.relative_to(checkpoint), path.read_bytes()) for path in files]


def same_run(run):
    for name, host, nodes in [("near", "127.0.0.1", None), ("far", ADDRESSES[0], NODES)]:
        began = time.monotonic()
        codes, errors = finish(start(run, run.recipe(name, 10), host, nodes))
        check(
            codes == [0, 0],
            f"{name}: ten steps of two ranks, {time.monotonic() - began:.1f} s",
            errors,
        )
    losses = [[step["loss"] for step in run.events(name, "step")] for name in ("near", "far")]
    check(
        losses[0] == losses[1] and len(losses[0]) == 10,
        "every loss is the same, bit for bit",
        losses,
    )
    check(weights(run, "near") == weights(run, "far"), "and every weight and moment", "they differ")


def cut_run(run, link):
    recipe = run.recipe("cut", 4000, f"[ranks]\ntimeout_secs = {TIMEOUT_SECS}\n")
    ranks = start(run, recipe, ADDRESSES[0], NODES)
    end = time.monotonic() + 300
    while (
        len(run.events("cut", "step")) < 5
        and all(rank.poll() is None for rank in ranks)
        and time.monotonic() < end
    ):
        time.sleep(0.01)
    link.cut()
    began = time.monotonic()
    codes, errors = finish(ranks)
    secs = time.monotonic() - began
    check(codes == [1, 1], "with the link cut both ranks end with exit code 1", (codes, errors))
    check(
        secs < TIMEOUT_SECS + GRACE_SECS,
        f"within the time-out of {TIMEOUT_SECS} s and what it takes to look: {secs:.1f} s",
        secs,
    )
    for rank, text in enumerate(errors):
        lines = [line for line in text.splitlines() if "error: " in line]
        check(
            len(lines) == 1 and f"rank {1 - rank}" in lines[0],
            f"rank {rank} says in one line who is gone",
            text,
        )
        print(f"    {lines[0]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rectiflow")
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--loss", type=float, default=0.01)
    args = parser.parse_args()
    if shutil.which("ip") is None or shutil.which("tc") is None:
        sys.exit(print("skipped: `ip` and `tc` (iproute2) are not installed"))
    try:
        nodes = Nodes(args.delay_ms, args.loss)
    except OSError as reason:
        Nodes.remove()
        sys.exit(print(f"skipped: network namespaces are not allowed here ({reason})"))
    try:
        print(
            f"two namespaces, {args.delay_ms:g} ms and {args.loss:.1%} loss each way by {nodes.how}",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            run = SmallRun(folder, str(pathlib.Path(args.rectiflow).absolute()))
            same_run(run)
            cut_run(run, nodes)
    finally:
        Nodes.remove()


main()
