"""Checks what torchrun restarts: a killed rank's run, and not a run that the guard stopped.

    python scripts/ranks/restarts.py RECTIFLOW TORCHRUN

RECTIFLOW is the program, TORCHRUN that of a Python environment with torch (`make restarts` passes
both). A killed rank's run resumes from its last checkpoint; a stop by the guard stays a stop;
SIGTERM saves. The script of launch/kubernetes.yaml, run as it stands, exits as its ranks did. Two
ranks on this machine, CPU and Gloo; a minute.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import yaml

from small_run import ROOT, SmallRun, check

PATIENCE_SECS = 600
NUM_STEPS = 120
CHECKPOINT_STEPS = 5
# Steps after which a rank is killed, if the first checkpoint is there too: training goes on while
# it is written.
STEPS_BEFORE_KILL = 7
# The guard may not rewind, and the rate is one that no weights survive.
STRICT_GUARD = "[guard]\nwarmup_updates = 2\nmax_rewinds = 0\n"
FATAL_RATE = "peak = 1e30"


def start_torchrun(torchrun, rectiflow, recipe):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_USE_RTLD_GLOBAL": "1"}
    command = [torchrun, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    command += ["--no-python", rectiflow, "train", str(recipe)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def is_rank(pid):
    return b"train" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def ranks_of(launcher):
    """The ids of the processes that the launcher has started."""
    tasks = pathlib.Path(f"/proc/{launcher.pid}/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    return [int(pid) for pid in children if is_rank(pid)]


def wait_for_checkpoint(run, name, launcher):
    end = time.monotonic() + PATIENCE_SECS
    folder = run.folder / name / "checkpoints"
    while time.monotonic() < end and launcher.poll() is None:
        if any(len(path.name) == len("step-00000000") for path in folder.glob("step-*")):
            return
        time.sleep(0.01)


def check_killed_rank(run, torchrun):
    launcher = start_torchrun(torchrun, run.rectiflow, run.recipe("killed", NUM_STEPS))
    run.wait_for_steps("killed", STEPS_BEFORE_KILL, [launcher], PATIENCE_SECS)
    wait_for_checkpoint(run, "killed", launcher)
    ranks = ranks_of(launcher)
    check(len(ranks) == 2, "two ranks are running", ranks)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=PATIENCE_SECS)
    finished = launcher.returncode == 0
    check(finished, "after kill -9 of rank 1 torchrun restarts both and the run finishes", errors)
    starts = [event["step"] for event in run.events("killed", "start")]
    resumed = len(starts) == 2 and starts[1] >= CHECKPOINT_STEPS
    check(resumed, "the second attempt resumed from a checkpoint", starts)
    steps = run.events("killed", "step")
    check(steps[-1]["step"] == NUM_STEPS, "the run took all steps", steps[-1])


def check_guard_stop(run, torchrun):
    recipe = run.recipe("stopped", 4000, STRICT_GUARD)
    recipe.write_text(recipe.read_text().replace("peak = 0.0001", FATAL_RATE))
    launcher = start_torchrun(torchrun, run.rectiflow, recipe)
    _, errors = launcher.communicate(timeout=PATIENCE_SECS)
    check(launcher.returncode != 0, "torchrun gives up", launcher.returncode)
    reason = run.folder / "stopped/STOPPED"
    check(reason.is_file(), "the run folder has the reason for the stop", errors)
    starts, acts = run.events("stopped", "start"), run.events("stopped", "guard")
    check(acts and acts[-1]["action"] == "stop", "the guard stopped the run", acts)
    check(len(starts) == 1, "no restart trained further", starts)
    # If one rank is faster, torchrun itself ends the other one.
    has_code = "exitcode  : 3" in errors or "exitcode: 3" in errors
    check(has_code, "the ranks ended with exit code 3", errors)


def check_all_saved(run, name, what, found):
    """The newest checkpoint is that of the last step."""
    steps, ends = run.events(name, "step"), run.events(name, "end")
    newest = max((run.folder / name / "checkpoints").iterdir()).name
    saved = ends and newest == f"step-{steps[-1]['step']:08}"
    check(saved, f"{what}: both ranks save the last step, {newest}", found)


def check_terminated(run, torchrun):
    launcher = start_torchrun(torchrun, run.rectiflow, run.recipe("terminated", 4000))
    run.wait_for_steps("terminated", STEPS_BEFORE_KILL, [launcher], PATIENCE_SECS)
    launcher.terminate()
    _, errors = launcher.communicate(timeout=PATIENCE_SECS)
    check_all_saved(run, "terminated", "SIGTERM of torchrun", errors)
    check(launcher.returncode == 1, "torchrun itself exits with 1", launcher.returncode)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_pod(run, torchrun, recipe):
    """Starts the script of launch/kubernetes.yaml as the only pod, with two ranks."""
    documents = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    job = next(document for document in documents if document["kind"] == "Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    # Pods have these names in a cluster.
    script = container["args"][0].replace("rectiflow-$JOB_COMPLETION_INDEX.rectiflow", "localhost")
    programs = run.folder / "bin"
    programs.mkdir(exist_ok=True)
    if not (programs / "rectiflow").exists():
        (programs / "rectiflow").symlink_to(run.rectiflow)
    environment = os.environ | {
        "PATH": f"{programs}:{pathlib.Path(torchrun).parent}:{os.environ['PATH']}",
        "NUM_NODES": "1",
        "GPUS_PER_NODE": "2",
        "RECIPE": str(recipe),
        "RUN_DIR": str(run.folder / recipe.stem),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "TORCH_USE_RTLD_GLOBAL": "1",
    }
    return subprocess.Popen(
        ["bash", "-c", script],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_pod(run, torchrun):
    broken = run.recipe("broken", NUM_STEPS)
    broken.write_text(broken.read_text().replace("micro_batch = 1", "micro_batch = 0"))
    pod = start_pod(run, torchrun, broken)
    _, errors = pod.communicate(timeout=PATIENCE_SECS)
    check(pod.returncode == 2, "a pod whose recipe cannot run exits with 2", errors)

    pod = start_pod(run, torchrun, run.recipe("evicted", 4000))
    run.wait_for_steps("evicted", STEPS_BEFORE_KILL, [pod], PATIENCE_SECS)
    pod.terminate()
    _, errors = pod.communicate(timeout=PATIENCE_SECS)
    check_all_saved(run, "evicted", "SIGTERM of a pod", errors)
    check(pod.returncode == 143, "the pod exits with 143", (pod.returncode, errors))

    pod = start_pod(run, torchrun, run.recipe("healthy", NUM_STEPS))
    _, errors = pod.communicate(timeout=PATIENCE_SECS)
    check(pod.returncode == 0, "a healthy pod exits with 0", errors)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    rectiflow, torchrun = (str(pathlib.Path(path).absolute()) for path in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        run = SmallRun(folder, rectiflow)
        check_killed_rank(run, torchrun)
        check_guard_stop(run, torchrun)
        check_terminated(run, torchrun)
        check_pod(run, torchrun)


if __name__ == "__main__":
    main()
