"""Runs launch/slurm.sbatch under a real Slurm on this machine: what ends the job, what requeues it.

    python3 scripts/ranks/slurm.py RECTIFLOW

Starts munged, slurmctld and slurmd in a temporary folder, with one node of four pretended cores and
two pretended GPUs, and submits the script with two ranks on the CPU. Three minutes.

1. A healthy run ends COMPLETED. A rank that exits with 1, 2 or 3 before the first new checkpoint, a
   recipe that cannot run and a stop by the guard end FAILED with that exit code, and `scancel` ends
   CANCELLED; none of them is requeued.
2. SIGTERM, `scontrol requeue`, a preemption and the time limit save a checkpoint, and the job is
   requeued. A killed rank and a failure after a new checkpoint are requeued as well, but not for
   ever. The run then equals the healthy one, bit for bit.

Requires root, munge and Slurm (Debian: slurm-wlm and munge; written for 22.05); without them the
script says so and ends with exit code 0 without testing anything.
"""

import contextlib
import os
import pathlib
import signal
import sys
import tempfile

from slurm_cluster import Cluster, must, reason_to_skip
from small_run import ROOT, SmallRun, check

NUM_STEPS = 40
ENDS = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"]
# Steps after which a run is disturbed: behind the first checkpoint.
STEPS_BEFORE = 7
# The guard may not rewind, and the rate is one that no weights survive.
STRICT_GUARD = "[guard]\nwarmup_updates = 2\nmax_rewinds = 0\n"
FATAL_RATE = "peak = 1e30"
RECTIFLOW = """#!/bin/bash
# Rank 1 fails as the file `fail` says: "early CODE" once rank 0 waits for it, "late CODE" after a
# checkpoint.
[ "$RANK" = 1 ] && [ -e '{folder}/fail' ] && read -r when code <'{folder}/fail'
if [ "$when" = early ]; then
    until (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT"); do sleep 0.1; done 2>/dev/null
    exit "$code"
fi
if [ "$when" = late ]; then
    '{rectiflow}' "$@" &
    until [ -e "$RUN_DIR/checkpoints/step-00000005" ]; do sleep 0.1; done
    kill -9 $!
    exit "$code"
fi
exec '{rectiflow}' "$@"
"""


class Job:
    """launch/slurm.sbatch, submitted for a small run."""

    def __init__(self, cluster, run, name, recipe, options=(), **variables):
        self.cluster, self.run, self.name = cluster, run, name
        folder = run.folder
        environment = os.environ | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RECIPE": str(recipe),
            "RUN_DIR": str(folder / name),
            **variables,
        }
        self.log = folder / f"{name}.log"
        command = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2"]
        command += ["--gpus-per-node=2", "--cpus-per-task=2", f"--output={self.log}", *options]
        self.id = must(*command, str(ROOT / "launch/slurm.sbatch"), env=environment, cwd=folder)

    def field(self, name):
        """A field of `scontrol show job`."""
        words = must("scontrol", "--oneliner", "show", "job", self.id).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def found(self):
        fields = [f"{name}={self.field(name)}" for name in ["JobState", "Restarts", "ExitCode"]]
        log = self.log.read_text() if self.log.exists() else ""
        return f"{' '.join(fields)}\n{log}"

    def wait_for_state(self, state):
        def is_there():
            return self.field("JobState") == state

        self.cluster.wait_for(is_there, f"{self.name} becomes {state}", self.found)

    def wait_for_end(self, restarts=0):
        """Waits until the job has ended, or is in the queue once more than it should be."""

        def has_ended():
            state = self.field("JobState")
            return state in ENDS or int(self.field("Restarts")) > restarts

        self.cluster.wait_for(has_ended, f"{self.name} ends", self.found)

    def wait_for_steps(self, count=STEPS_BEFORE):
        def are_done():
            return len(self.run.events(self.name, "step")) >= count

        self.cluster.wait_for(are_done, f"{self.name} takes {count} steps", self.found)

    def wait_for_requeue(self, restarts=1):
        """Waits until the job is in the queue again, and starts it at once."""

        def is_pending():
            return self.field("JobState") == "PENDING" and self.field("Restarts") == str(restarts)

        self.cluster.wait_for(is_pending, f"{self.name} is requeued", self.found)
        must("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def check_end(self, what, state, code, restarts=0):
        self.wait_for_end(restarts)
        end = f"{self.field('JobState')} {self.field('ExitCode')} after {self.field('Restarts')}"
        expected = f"{state} {code} after {restarts}"
        check(end == expected, f"{what}: {expected} restarts", self.found())

    def exit_code(self, rank, start=0):
        """The exit code that a rank has left."""
        path = self.run.folder / f"{self.name}/slurm/{self.id}/start-{start}/rank-{rank}"
        return path.read_text().strip() if path.exists() else "none"

    def pids_of_rank(self, rank):
        """The processes of a rank: its shell and rectiflow, in this order."""
        found = []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes().split(b"\0")
                wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={rank}".encode()}
                if wanted <= set(environment):
                    found.append(int(folder.name))
        return sorted(found)


def install(run):
    """Puts a `rectiflow` that can fail where jobs find it."""
    program = run.folder / "bin/rectiflow"
    program.parent.mkdir()
    program.write_text(RECTIFLOW.format(folder=run.folder, rectiflow=run.rectiflow))
    program.chmod(0o755)


def outcome(run, name):
    """Losses by step, and the tensor files of the newest checkpoint as (name, bytes)."""
    losses = {event["step"]: event["loss"] for event in run.events(name, "step")}
    checkpoint = max((run.folder / name / "checkpoints").iterdir())
    files = sorted(path for path in checkpoint.rglob("*.safetensors"))
    return losses, [(path.relative_to(checkpoint), path.read_bytes()) for path in files]


def check_healthy(cluster, run):
    job = Job(cluster, run, "healthy", run.recipe("healthy", NUM_STEPS))
    job.wait_for_steps(1)
    step = must("scontrol", "--oneliner", "show", "step", f"{job.id}.0")
    check(" CPUs=4 " in step, "the ranks have the cores of --cpus-per-task", step)
    job.check_end("a healthy run", "COMPLETED", "0:0")
    check(len(run.events("healthy", "step")) == NUM_STEPS, "it took all steps", job.found())


def check_failures(cluster, run):
    for code in (1, 2, 3):
        (run.folder / "fail").write_text(f"early {code}\n")
        job = Job(cluster, run, f"exit-{code}", run.recipe(f"exit-{code}", NUM_STEPS))
        job.check_end(f"a rank exits with {code} at the start", "FAILED", f"{code}:0")
        codes = [job.exit_code(rank) for rank in (0, 1)]
        check(codes == ["143", str(code)], "the rank that waited for it obeyed SIGTERM", codes)
        (run.folder / "fail").unlink()

    broken = run.recipe("broken", NUM_STEPS)
    broken.write_text(broken.read_text().replace("micro_batch = 1", "micro_batch = 0"))
    Job(cluster, run, "broken", broken).check_end("a recipe that cannot run", "FAILED", "2:0")

    fatal = run.recipe("stopped", 4000, STRICT_GUARD)
    fatal.write_text(fatal.read_text().replace("peak = 0.0001", FATAL_RATE))
    Job(cluster, run, "stopped", fatal).check_end("a stop by the guard", "FAILED", "3:0")

    job = Job(cluster, run, "cancelled", run.recipe("cancelled", 4000))
    job.wait_for_steps()
    must("scancel", job.id)
    job.check_end("scancel", "CANCELLED", "0:15")


def signal_ranks(job):
    must("scancel", "--signal=TERM", job.id)


def requeue(job):
    must("scontrol", "requeue", job.id)


def preempt(job):
    must("sbatch", "--partition=high", "--output=/dev/null", "--exclusive", "--wrap=true")


def kill_rank(job):
    os.kill(job.pids_of_rank(1)[-1], signal.SIGKILL)


def kill_rank_and_shell(job):
    for pid in job.pids_of_rank(1):
        os.kill(pid, signal.SIGKILL)


def check_continues(cluster, run, name, what, disturb):
    """Disturbs a run, which is requeued and becomes equal to the undisturbed one."""
    job = Job(cluster, run, name, run.recipe(name, NUM_STEPS))
    if disturb:
        job.wait_for_steps()
        disturb(job)
    job.wait_for_requeue()
    (run.folder / "fail").unlink(missing_ok=True)
    job.wait_for_end(restarts=1)
    starts = [event["step"] for event in run.events(name, "start")]
    is_resumed = job.field("JobState") == "COMPLETED" and len(starts) == 2 and starts[1] >= 5
    check(is_resumed, f"{what}: requeued, resumed from step {starts[-1]}", job.found())
    is_equal = outcome(run, name) == outcome(run, "healthy")
    check(is_equal, "every loss, weight and moment is that of the healthy run", "they differ")
    return job, starts


def check_stops(cluster, run):
    """After a stop, nothing is trained twice: the job resumes at the step that it had reached."""
    stops = [
        ("signalled", "scancel --signal=TERM", signal_ranks),
        ("requeued", "scontrol requeue", requeue),
        ("preempted", "a preemption", preempt),
    ]
    for name, what, disturb in stops:
        job, _ = check_continues(cluster, run, name, what, disturb)
        steps = [event["step"] for event in run.events(name, "step")]
        check(steps == sorted(set(steps)), "no step was trained twice", steps)
        codes = [job.exit_code(rank) for rank in (0, 1)]
        check(codes == ["143", "143"], "both ranks had time to save", codes)


def check_losses(cluster, run):
    check_continues(cluster, run, "killed", "kill -9 of a rank", kill_rank)
    check_continues(cluster, run, "lost", "kill -9 of a rank and its shell", kill_rank_and_shell)
    (run.folder / "fail").write_text("late 1\n")
    check_continues(cluster, run, "late", "exit code 1 after a checkpoint", None)


def check_limits(cluster, run):
    """A rank that dies at every start; and a job that Slurm may not requeue."""
    job = Job(cluster, run, "often", run.recipe("often", 4000), MAX_RESTARTS="1")
    job.wait_for_steps()
    kill_rank(job)
    job.wait_for_requeue()
    job.wait_for_state("RUNNING")
    job.wait_for_steps(len(run.events("often", "step")) + STEPS_BEFORE)
    kill_rank(job)
    job.check_end("MAX_RESTARTS=1, the second loss of a rank", "FAILED", "137:0", restarts=1)

    job = Job(cluster, run, "once", run.recipe("once", 4000), options=["--no-requeue"])
    job.wait_for_steps()
    signal_ranks(job)
    job.check_end("SIGTERM where the job may not be requeued", "FAILED", "143:0")


def check_time_limit(cluster, run):
    limits = ["--time=1", "--signal=TERM@45"]
    job = Job(cluster, run, "limited", run.recipe("limited", 100_000), options=limits)
    job.wait_for_requeue()
    saved = run.events("limited", "end")[-1]["step"]
    job.wait_for_state("RUNNING")
    job.wait_for_steps(len(run.events("limited", "step")) + 1)
    starts = [event["step"] for event in run.events("limited", "start")]
    check(starts == [0, saved], f"the time limit: requeued, resumed from step {saved}", starts)
    must("scancel", job.id)
    job.wait_for_state("CANCELLED")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if reason := reason_to_skip():
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        rectiflow = str(pathlib.Path(sys.argv[1]).absolute())
        cluster, run = Cluster(folder / "slurm"), SmallRun(folder, rectiflow)
        install(run)
        try:
            cluster.start()
            print(must("sinfo", "--version"), flush=True)
            check_healthy(cluster, run)
            check_failures(cluster, run)
            check_stops(cluster, run)
            check_losses(cluster, run)
            check_limits(cluster, run)
            check_time_limit(cluster, run)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
