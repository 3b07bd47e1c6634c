"""torchrun restarts what has failed: a killed rank's run goes on from its last checkpoint, a stop by the guard stays a stop.

    python scripts/ranks/restarts.py RECTIFLOW TORCHRUN

RECTIFLOW is the program, TORCHRUN that of a Python environment with torch (`make restarts` has
both). Two ranks on this machine, processor and Gloo. Half a minute.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from small_run import SmallRun, check

PATIENCE_SECS = 180


def torchrun(torchrun, rectiflow, recipe):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_USE_RTLD_GLOBAL": "1"}
    launch = [
        torchrun,
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
        "--no-python",
    ]
    command = [*launch, rectiflow, "train", str(recipe)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def ranks_of(launcher):
    """Processes that the launcher has started."""
    tasks = pathlib.Path(f"/proc/{launcher.pid}/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    is_rank = lambda pid: b"train" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return [int(pid) for pid in children if is_rank(pid)]


def killed(run, program):
    launcher = torchrun(program, run.rectiflow, run.recipe("killed", 40))
    end = time.monotonic() + PATIENCE_SECS
    while (
        len(run.events("killed", "step")) < 7 and launcher.poll() is None and time.monotonic() < end
    ):
        time.sleep(0.01)
    ranks = ranks_of(launcher)
    check(len(ranks) == 2, "two ranks are at work", ranks)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=PATIENCE_SECS)
    check(
        launcher.returncode == 0,
        "after kill -9 of rank 1 torchrun starts both again, and the run is finished",
        errors,
    )
    starts = [event["step"] for event in run.events("killed", "start")]
    check(
        len(starts) == 2 and starts[1] >= 5, "the second attempt went on from a checkpoint", starts
    )
    steps = run.events("killed", "step")
    check(steps[-1]["step"] == 40, "all steps were made", steps[-1])


def stopped(run, program):
    # A rate that no weights survive, and a guard that may not rewind.
    guard = "[guard]\nwarmup_updates = 2\nmax_rewinds = 0\n"
    recipe = run.recipe("stopped", 4000, guard)
    recipe.write_text(recipe.read_text().replace("peak = 0.0001", "peak = 1e30"))
    launcher = torchrun(program, run.rectiflow, recipe)
    _, errors = launcher.communicate(timeout=PATIENCE_SECS)
    check(launcher.returncode != 0, "torchrun gives up", launcher.returncode)
    check(
        (run.folder / "stopped/STOPPED").is_file(),
        "the reason of the stop is in the run folder",
        errors,
    )
    starts, acts = run.events("stopped", "start"), run.events("stopped", "guard")
    check(acts and acts[-1]["action"] == "stop", "the guard has stopped the run", acts)
    check(len(starts) == 1, "no restart has trained on", starts)
    # Where one rank is faster, torchrun ends the other one itself.
    check(
        "exitcode  : 3" in errors or "exitcode: 3" in errors,
        "the ranks ended with exit code 3",
        errors,
    )


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    rectiflow, program = (str(pathlib.Path(path).absolute()) for path in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        run = SmallRun(folder, rectiflow)
        killed(run, program)
        stopped(run, program)


main()
