#!/usr/bin/env bash
# A Slurm of one machine, for tests: tests/slurm/slurm.sh start FOLDER, tests/slurm/slurm.sh stop FOLDER.
#
# As root on Debian or Ubuntu. `start` installs slurm-wlm and munge where they are not there, and starts munged,
# slurmctld and slurmd, whose files and logs are all in FOLDER; `export SLURM_CONF=FOLDER/slurm.conf` has sbatch,
# squeue and the rest use it. There is no accounting: sacct does not work.
set -euo pipefail

start() {
  command -v slurmctld slurmd munged sbatch > /dev/null || {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > /dev/null
  }
  mkdir -p "$folder"/{state,spool}
  # munged refuses keys and sockets in folders that others may write to, so /tmp/FOLDER needs --force
  head -c 1024 /dev/urandom > "$folder/munge.key"
  chmod 400 "$folder/munge.key"
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
  host=$(hostname -s)
  cat > "$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${port:=$((20000 + RANDOM % 20000))}
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
KillWait=5
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld
  slurmd
  for _ in $(seq 60); do
    [[ $(sinfo --noheader --format=%T 2> /dev/null) == idle ]] && return
    sleep 0.5
  done
  echo "the node did not come up; see $folder/*.log" >&2
  stop
  exit 1
}

stop() {
  for name in slurmd slurmctld munged; do
    [[ -f "$folder/$name.pid" ]] || continue
    pid=$(cat "$folder/$name.pid")
    kill "$pid" 2> /dev/null || true
    for _ in $(seq 100); do
      kill -0 "$pid" 2> /dev/null || break
      sleep 0.1
    done
  done
}

[[ $# == 2 && $1 =~ ^(start|stop)$ ]] || { echo "usage: $0 start|stop FOLDER" >&2; exit 2; }
folder=$(realpath -m "$2")
"$1"
