#!/usr/bin/env bash
# Slurm 22.05.8: `srun --kill-on-bad-exit=1` returns the largest exit code of its tasks. If one task
# exits with 1, 2 or 3 and the others answer the SIGTERM that follows as programs that save do, with
# 143, srun returns 143: the same as after a time limit or a preemption. A batch script that requeues
# its job on 143 puts a broken one back into the queue for ever.
#
# Needs root and the packages slurm-wlm and munge (Debian 12), whose daemons it runs in a temporary
# folder. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
daemons=()
finish() {
    if [ ${#daemons[@]} -gt 0 ]; then kill "${daemons[@]}" 2>/dev/null || true; wait; fi
    rm -rf "$folder"
}
trap finish EXIT
cd "$folder"
chmod 755 .
mkdir munge state spool
(umask 277; head -c 1024 /dev/urandom >munge/key)
host=$(hostname -s)
cat >slurm.conf <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=27917
SlurmdPort=27918
SlurmUser=root
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=100
PartitionName=all Nodes=$host Default=YES
CONF
touch cgroup.conf
export SLURM_CONF=$folder/slurm.conf
munged --foreground --force --key-file=munge/key --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" >munged.out 2>&1 &
daemons+=($!)
until [ -S munge/socket ]; do kill -0 "${daemons[0]}"; sleep 0.2; done
slurmctld -D -c >slurmctld.out 2>&1 &
daemons+=($!)
slurmd -D >slurmd.out 2>&1 &
daemons+=($!)
until sinfo -h -o %T 2>/dev/null | grep -q idle; do kill -0 "${daemons[@]}"; sleep 0.5; done

sinfo --version
for code in 1 2 3; do
    status=0
    # Task 1 fails; task 0 saves on SIGTERM and exits with 143.
    srun --ntasks=2 --kill-on-bad-exit=1 bash -c '
        if [ $SLURM_PROCID = 1 ]; then sleep 2; exit '$code'; fi
        trap "exit 143" TERM
        while :; do sleep 0.1; done
    ' 2>srun.out || status=$?
    echo "task 1 exits with $code, task 0 with 143: srun returns $status"
    [ $status -eq 143 ]
done
