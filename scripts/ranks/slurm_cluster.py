"""A Slurm of one node in a temporary folder, shared by slurm.py and slurm_prep.py.

munged, slurmctld and slurmd run as this user, who must be root; the node has four pretended cores
and two pretended GPUs, and the partition `high` preempts `low`, the default.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo", "squeue"]
PATIENCE_SECS = 300
CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=100 Gres=gpu:2
PartitionName=low Nodes={host} Default=YES PriorityTier=1
PartitionName=high Nodes={host} PriorityTier=10
"""


def sh(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def must(*command, **options):
    done = sh(*command, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


class Cluster:
    """Slurm's daemons, with all their files in a folder."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        for name in ["munge", "state", "spool"]:
            (folder / name).mkdir(mode=0o755, parents=True)
        key = folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.host = socket.gethostname().split(".")[0]
        ports = free_ports(2)
        configuration = CONFIGURATION.format(
            folder=folder, host=self.host, controller_port=ports[0], node_port=ports[1]
        )
        (folder / "slurm.conf").write_text(configuration)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (folder / "cgroup.conf").touch()
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self):
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
        munge |= {"log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge/{name}" for option, name in munge.items()]
        self.start_daemon("munged", "--foreground", "--force", *options)
        self.wait_for((self.folder / "munge/socket").exists, "munged listens")
        self.start_daemon("slurmctld", "-D", "-c")
        self.wait_for(lambda: sh("sinfo").returncode == 0, "slurmctld answers")
        self.start_daemon("slurmd", "-D")
        self.wait_for(lambda: "idle" in sh("sinfo", "-h", "-o", "%T").stdout, "the node is idle")

    def start_daemon(self, *command):
        with open(self.folder / f"{command[0]}.out", "w") as output:
            self.daemons.append(subprocess.Popen(command, stdout=output, stderr=output))

    def stop(self):
        """Ends all jobs, then the daemons."""
        sh("scancel", "--user=root")
        end = time.monotonic() + PATIENCE_SECS
        while sh("squeue", "-h").stdout and time.monotonic() < end:
            time.sleep(0.1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def wait_for(self, holds, what, found=lambda: ""):
        end = time.monotonic() + PATIENCE_SECS
        while not holds():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text() for path in self.folder.glob("*.out"))
                sys.exit(f"FAILED: {what} within {PATIENCE_SECS} s\nfound: {found()}\n{logs}")
            time.sleep(0.1)


def reason_to_skip():
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"
