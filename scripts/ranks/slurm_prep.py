"""Runs launch/prep-slurm.sh under a real Slurm on this machine.

    python3 scripts/ranks/slurm_prep.py RECTIFLOW

Starts Slurm as slurm.py does, and prepares emoji with three workers on the CPU. Two minutes.

1. Three jobs in a row make the data set that one process makes, byte for byte.
2. A worker that is killed with `kill -9`, in the facts and in the objects, is requeued and goes on
   where it was; so is one that Slurm preempts. The data set is the same.
3. Settings that cannot work end the array with exit code 2, and the jobs behind it are cancelled.

Without root, munge and Slurm the script says so and ends with exit code 0 without testing anything.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

from slurm_cluster import Cluster, must, reason_to_skip
from small_run import PREP, ROOT, check, unpack_pictures

NUM_PICTURES = 1400
NUM_WORKERS = 3
NUM_GPUS = 2
MORE_SETTINGS = "object_rows = 64\nencode_batch = 2\n"
ENDS = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"]
# The worker that is killed, in both stages.
VICTIM = 1
RECTIFLOW = """#!/bin/bash
# `kill` in the folder of the job: worker {victim} is killed in its first start, in the facts at
# once, in the objects when its first one is finished. `slow`: objects take half a minute.
folder=$(dirname "$OUT")
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ "$PREP_STAGE" = objects ] && [ -e "$folder/slow" ] && [ "$restarts" = 0 ]; then
    sleep 30
fi
if [ -e "$folder/kill" ] && [ "${{SLURM_ARRAY_TASK_ID:-}}" = {victim} ] && \\
    [ "$PREP_STAGE" != join ] && [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then
    '{rectiflow}' "$@" &
    if [ "$PREP_STAGE" = objects ]; then
        until ls "$OUT"/prep/objects/*.json; do sleep 0.01; done >/dev/null 2>&1
    fi
    kill -9 $!
    wait $!
    exit
fi
exec '{rectiflow}' "$@"
"""


class Preparation:
    """The jobs of launch/prep-slurm.sh in a folder of their own."""

    def __init__(self, cluster, root, name, *options, marks=()):
        self.cluster, self.name, self.folder = cluster, name, root / name
        self.folder.mkdir()
        for mark in marks:
            (self.folder / mark).touch()
        self.out = self.folder / "dataset"
        environment = os.environ | {
            "PATH": f"{root}/bin:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "SOURCE": str(root / "pictures"),
            "OUT": str(self.out),
            "VAE": str(ROOT / "assets/tiny-sdxl/vae"),
            "DEVICE": "cpu",
            "CPUS_PER_TASK": "1",
        }
        command = ["bash", str(ROOT / "launch/prep-slurm.sh"), str(NUM_WORKERS)]
        command += ["--recipe", str(root / "prep.toml"), *options]
        said = must(*command, env=environment, cwd=self.folder)
        self.jobs = dict(part.split(" ") for part in said.split(", "))

    def tasks(self, stage):
        """The fields of each task of a job, by its number; of a job that is no array by ""."""
        found = {}
        shown = must("scontrol", "--oneliner", "show", "job", self.jobs[stage])
        for line in shown.splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            found[fields.get("ArrayTaskId", "")] = fields
        return found

    def states(self, stage):
        return [fields["JobState"] for fields in self.tasks(stage).values()]

    def found(self):
        lines = []
        for stage in self.jobs:
            for task, fields in self.tasks(stage).items():
                lines.append(f"{stage} {task} {fields['JobState']} {fields['ExitCode']}")
        logs = [path.read_text() for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(lines + logs)

    def wait_for_end(self):
        """Waits until the last job has ended; what is requeued starts at once."""

        def has_ended():
            for stage in self.jobs:
                for fields in self.tasks(stage).values():
                    is_held = fields["Reason"] == "BeginTime"
                    if is_held and fields["JobState"] == "PENDING":
                        must("scontrol", "update", f"JobId={fields['JobId']}", "StartTime=now")
            return all(state in ENDS for state in self.states("join"))

        self.cluster.wait_for(has_ended, f"{self.name} ends", self.found)

    def restarts(self, stage):
        """The number of restarts of each task."""
        restarts = {}
        for task, fields in self.tasks(stage).items():
            if fields["Restarts"] != "0":
                restarts[task] = int(fields["Restarts"])
        return restarts

    def check_equal(self, what, reference, restarts):
        self.wait_for_end()
        check(self.states("join") == ["COMPLETED"], f"{what}: joined", self.found())
        found = {stage: self.restarts(stage) for stage in self.jobs}
        found = {stage: tasks for stage, tasks in found.items() if tasks}
        check(found == restarts, f"restarts: {restarts}", f"{found}\n{self.found()}")
        own, other = files(self.out), files(reference)
        unlike = [name for name in own | other if own.get(name) != other.get(name)]
        check(not unlike, "the data set is that of one process, byte for byte", unlike)


def files(folder):
    """The files of a data set as (name, bytes), but for what preparations keep for themselves."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != "prep":
            found[str(name)] = path.read_bytes()
    return found


def prepare_alone(root, rectiflow):
    """The data set of one process. Latents depend on the number of threads, which jobs set to 1."""
    out = root / "alone"
    command = [rectiflow, "prep", root / "pictures", "--out", out, "--recipe", root / "prep.toml"]
    command += ["--vae", ROOT / "assets/tiny-sdxl/vae"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return out


def check_preemption(cluster, root, reference):
    preparation = Preparation(cluster, root, "preempted", marks=["slow"])

    def objects_run():
        return preparation.states("objects").count("RUNNING") == NUM_GPUS

    cluster.wait_for(objects_run, "workers make objects on all GPUs", preparation.found)
    must("sbatch", "--partition=high", "--output=/dev/null", "--exclusive", "--wrap=true")
    # The last worker waits for a GPU and was not in the way.
    restarts = {"objects": {str(task): 1 for task in range(NUM_GPUS)}}
    preparation.check_equal("a preemption of the workers that run", reference, restarts)


def check_refused(cluster, root):
    preparation = Preparation(cluster, root, "refused", "--set", "prep.step_px=3")
    preparation.wait_for_end()
    codes = [fields["ExitCode"] for fields in preparation.tasks("facts").values()]
    check(codes == ["2:0"] * NUM_WORKERS, "settings that cannot work: exit code 2", codes)
    check(not preparation.restarts("facts"), "no worker was requeued", preparation.found())
    behind = preparation.states("objects") + preparation.states("join")
    check(set(behind) == {"CANCELLED"}, "the jobs behind them are cancelled", behind)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if reason := reason_to_skip():
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        root.chmod(0o755)
        rectiflow = str(pathlib.Path(sys.argv[1]).absolute())
        (root / "pictures").mkdir()
        unpack_pictures(root / "pictures", NUM_PICTURES)
        (root / "prep.toml").write_text(PREP + MORE_SETTINGS)
        (root / "bin").mkdir()
        program = root / "bin/rectiflow"
        program.write_text(RECTIFLOW.format(rectiflow=rectiflow, victim=VICTIM))
        program.chmod(0o755)
        reference = prepare_alone(root, rectiflow)
        cluster = Cluster(root / "slurm")
        try:
            cluster.start()
            print(must("sinfo", "--version"), flush=True)
            healthy = Preparation(cluster, root, "healthy")
            healthy.check_equal("three workers", reference, {})
            killed = Preparation(cluster, root, "killed", marks=["kill"])
            restarts = {"facts": {str(VICTIM): 1}, "objects": {str(VICTIM): 1}}
            killed.check_equal("kill -9 of a worker in both stages", reference, restarts)
            check_preemption(cluster, root, reference)
            check_refused(cluster, root)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
