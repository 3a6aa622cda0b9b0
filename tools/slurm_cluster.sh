#!/usr/bin/env bash
# A temporary Slurm cluster on this machine for tests; see `tools/slurm_cluster.sh --help`.
#
# Every daemon has SLURM_CLUSTER_PART=<folder>:<part> in its environment, and Slurm sets the cluster name, derived from
# the folder, for every process of a job. Processes are found by these two variables, never by a pid file.
set -euo pipefail
umask 077
export LC_ALL=C.UTF-8 PATH=$PATH:/usr/sbin:/sbin

readonly START_SECONDS=300 LOCK_SECONDS=600 APT_SECONDS=300
readonly MACHINE_LOCK=/run/lock/slurm_cluster
readonly PACKAGES=(slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core mariadb-client-core)
readonly PROGRAMS=(slurmctld slurmd srun sacct slurmdbd munged mariadbd mariadb-install-db my_print_defaults)

help() {
  cat <<'HELP'
A temporary Slurm cluster on this machine: real daemons, emulated nodes and GPUs, loopback only.

  tools/slurm_cluster.sh start DIR [--nodes N] [--cpus N] [--gpus N]
  tools/slurm_cluster.sh kill DIR NODE
  tools/slurm_cluster.sh revive DIR NODE
  tools/slurm_cluster.sh stop DIR [--purge]

start   creates a cluster in the folder DIR with nodes n1, n2, ... (default: 2 nodes with 4 CPUs and 2 GPUs each; they
        may have more than the machine). Installs missing Debian packages. A healthy cluster is left as it is; one that
        is not, or has other numbers, is stopped and created again with its job history.
kill    simulates a power cut of a node: freezes its slurmd, job steps and jobs, then kills them, and sets the node
        DOWN, so that its jobs become NODE_FAIL at once and are requeued (for at least 11 seconds).
revive  starts the node again and waits until it accepts jobs.
stop    cancels all jobs and ends every process of the cluster; --purge also removes its files from DIR.

Example, as root:

  tools/slurm_cluster.sh start /tmp/slurm
  . /tmp/slurm/env.sh                        # this shell uses this cluster; other shells do not
  srun -N 2 --gpus-per-node 1 sh -c 'echo $SLURMD_NODENAME has GPU $CUDA_VISIBLE_DEVICES'
  job=$(sbatch --parsable --wrap 'sleep 60'); sacct -j $job
  sbatch -p high -N 2 -c 4 --wrap 'sleep 5'  # preempts it: SIGTERM or the signal of --signal, SIGKILL 30 seconds later
  tools/slurm_cluster.sh stop /tmp/slurm --purge

Partitions: low (default; its jobs are requeued when preempted) and high (preempts them). The GPUs are device files that
behave like /dev/null. Outside DIR, start writes the node names to /etc/hosts (stop removes them) and a lock to /run/lock.
Several clusters can run side by side in separate folders. Calls for the same folder wait for each other.

Exit codes: 0 done, 1 error (one line on standard error), 2 wrong usage.
HELP
}

fail() {
  echo "slurm_cluster: $*" >&2
  exit 1
}

wrong_call() {
  echo "slurm_cluster: $*; see tools/slurm_cluster.sh --help" >&2
  exit 2
}

# --- processes ---

with_entry() { # ENTRY: the processes with this entry in their initial environment; zombies have none
  { grep -slzxF -- "$1" /proc/[0-9]*/environ || true; } | cut -d/ -f3 | sort
}

part_processes() { # PART
  with_entry "SLURM_CLUSTER_PART=$dir:$1"
}

with_descendants() { # PID...
  { grep -sE '^(State|PPid):' /proc/[0-9]*/status || true; } | awk -F '[/:\t ]+' -v roots="$*" '
    BEGIN { count = split(roots, given, " "); for (i = 1; i <= count; i++) found[given[i]] = 1 }
    $5 == "State" && $6 != "Z" && $6 != "X" { lives[$3] = 1 }
    $5 == "PPid" { parent[$3] = $6 }
    END {
      for (pid in lives) {
        for (above = pid; above in parent && !(above in found); above = parent[above]);
        if (above in found) print pid
      }
    }'
}

node_processes() { # NODE: its slurmd, its slurmstepd processes and the processes of its jobs
  local jobs daemons
  jobs=$(comm -12 <(with_entry "SLURM_CLUSTER_NAME=$name") <(with_entry "SLURMD_NODENAME=$1"))
  daemons=$(part_processes "$1")
  with_descendants "$daemons" "$jobs"
}

send() { # SIGNAL PIDS: some may have ended
  # shellcheck disable=SC2086 # several pids
  kill -s "$1" $2 2>/dev/null || true
}

freeze() { # COMMAND...: SIGSTOP to what the command lists, so that no daemon reports the death of a killed job
  local pids
  for _ in {1..100}; do
    pids=$("$@")
    send STOP "$pids"
    # shellcheck disable=SC2046,SC2086 # several pids
    grep -qsE '^State:[[:space:]]+[RSD]' $(printf '/proc/%s/status ' $pids) || return 0
    sleep 0.02
  done
}

kill_all() { # COMMAND...: SIGKILL to what the command lists, until it lists nothing
  local pids
  for _ in {1..100}; do
    pids=$("$@")
    [ -n "$pids" ] || return 0
    send KILL "$pids"
    sleep 0.05
  done
  fail "processes of $dir cannot be killed: ${pids//$'\n'/ }"
}

end_all() { # COMMAND...: SIGTERM, and SIGKILL after about 15 seconds
  local pids
  pids=$("$@")
  [ -n "$pids" ] || return 0
  send TERM "$pids"
  for _ in {1..300}; do
    [ -n "$("$@")" ] || return 0
    sleep 0.05
  done
  kill_all "$@"
}

launch() { # PART COMMAND...
  local part=$1
  shift
  env -i PATH="$PATH" LC_ALL="$LC_ALL" SLURM_CONF="$SLURM_CONF" SLURM_CLUSTER_PART="$dir:$part" "$@" \
    </dev/null >>"$dir/log/$part.out" 2>&1 8>&- 9>&- || fail "$part does not start; $(last_error "$part")"
}

last_error() { # PART: its log file and the last error or line in it
  local last
  last=$(cat "$dir/log/$1.out" "$dir/log/$1.log" 2>/dev/null | awk '/error|Error|fatal|^E:/ { error = $0 } END { print error ? error : $0 }')
  echo "see $dir/log/$1.log: $last"
}

wait_until() { # PART COMMAND...: until the command succeeds
  local part=$1
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$START_SECONDS" ] || fail "$part is not ready after $START_SECONDS seconds; $(last_error "$part")"
    sleep 0.1
  done
}

# --- the machine ---

require_root() {
  [ "$(id -u)" = 0 ] || fail "only root can start, stop and kill nodes of a cluster; call it with sudo"
}

lock_machine() { # until this script ends: keeps free ports free, and runs apt-get once
  exec 9>"$MACHINE_LOCK"
  flock -w "$LOCK_SECONDS" 9 || fail "another cluster has been starting for $LOCK_SECONDS seconds: $MACHINE_LOCK is held"
}

programs_missing() {
  local program
  for program in "${PROGRAMS[@]}"; do
    command -v "$program" >/dev/null || return 0
  done
  return 1
}

install_packages() {
  local policy=/usr/sbin/policy-rc.d made='' failed=''
  command -v apt-get >/dev/null || fail "no Slurm here and no apt-get to install it; needed: ${PACKAGES[*]}"
  echo "slurm_cluster: installing Debian packages: ${PACKAGES[*]}"
  if [ ! -e "$policy" ]; then # keep the packages from starting their daemons
    made=$policy
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  {
    apt_get update && apt_get install -y --no-install-recommends "${PACKAGES[@]}"
  } >"$dir/log/apt.log" 2>&1 || failed=yes
  [ -z "$made" ] || rm -f "$made"
  [ -z "$failed" ] || fail "apt-get failed; $(last_error apt)"
  ! programs_missing || fail "packages are installed but one of these is still missing: ${PROGRAMS[*]}"
}

apt_get() {
  (
    umask 022
    DEBIAN_FRONTEND=noninteractive timeout "$APT_SECONDS" apt-get -o DPkg::Lock::Timeout="$APT_SECONDS" \
      -o Acquire::Retries=3 "$@" </dev/null 8>&- 9>&-
  )
}

loopback_address() { # Slurm's daemons listen on the address of the host name
  local address
  address=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 { print $1 }') || true
  case $address in
    127.*) echo "$address" ;;
    *) fail "the host name $(hostname) resolves to '$address', not to loopback; put '127.0.0.1 $(hostname)' first in /etc/hosts" ;;
  esac
}

free_ports() { # COUNT: below the ephemeral port range
  local port found=0
  for port in $(shuf -i 20000-31999); do
    [ "$found" -lt "$1" ] || return 0
    if ! (: <>"/dev/tcp/$address/$port") 2>/dev/null; then
      echo "$port"
      found=$((found + 1))
    fi
  done
}

alone_with_hosts() { # COMMAND: run with a lock on /etc/hosts
  (
    flock -w 60 7 || fail "/etc/hosts is locked by another process"
    "$@"
  ) 7</etc/hosts
}

add_node_names() { # in /etc/hosts, which may be a mount point and is therefore edited in place
  local i
  remove_node_names
  [ -z "$(tail -c 1 /etc/hosts)" ] || echo >>/etc/hosts
  for ((i = 1; i <= nodes; i++)); do echo "127.0.0.$((10 + i)) n$i # slurm_cluster $dir"; done >>/etc/hosts
  for ((i = 1; i <= nodes; i++)); do
    [ "$(getent ahostsv4 "n$i" | awk 'NR == 1 { print $1 }')" = "127.0.0.$((10 + i))" ] ||
      fail "the name n$i does not resolve to 127.0.0.$((10 + i)); check /etc/hosts"
  done
}

remove_node_names() { # only the lines of this folder; other clusters may use the same node names
  local others
  grep -qF "# slurm_cluster $dir" /etc/hosts || return 0
  others=$(awk -v ours="# slurm_cluster $dir" 'substr($0, length($0) - length(ours) + 1) != ours' /etc/hosts)
  printf '%s\n' "$others" | dd of=/etc/hosts bs=1M iflag=fullblock conv=notrunc status=none # never empty for readers
  truncate -s "$(printf '%s\n' "$others" | wc -c)" /etc/hosts
}

# --- files ---

folder() { # DIR: set the variables derived from it
  dir=$(cd -- "$1" 2>/dev/null && pwd -P) || fail "no folder $1"
  [[ $dir =~ ^[A-Za-z0-9._/+-]+$ ]] || fail "the path $dir has characters that slurm.conf does not allow; use letters, digits and ._/+-"
  [ ${#dir} -le 80 ] || fail "the path of DIR is too long for sockets, ${#dir} letters: $dir; at most 80"
  export SLURM_CONF=$dir/etc/slurm.conf
  name=dev$(printf '%s' "$dir" | sha256sum | cut -c 1-12)
  [ "${SLURM_CLUSTER_NAME-}" != "$name" ] || fail "called from a job of the cluster in $dir; call it from outside"
  exec 8<"$dir"
  flock -w "$LOCK_SECONDS" 8 || fail "another call has locked $dir for $LOCK_SECONDS seconds"
}

existing_cluster() { # DIR
  folder "$1"
  [ -f "$dir/settings" ] || fail "no cluster in $dir; start one by: tools/slurm_cluster.sh start $dir"
}

existing_node() { # DIR NODE
  existing_cluster "$1"
  [[ " $(node_names) " = *" $2 "* ]] || fail "no node $2 in $dir; there are: $(node_names)"
}

node_names() {
  sed -n 's/^NodeName=\(n[0-9]*\) .*/\1/p' "$SLURM_CONF" 2>/dev/null | paste -sd ' '
}

node_list() { # in Slurm's notation
  if [ "$nodes" = 1 ]; then echo n1; else echo "n[1-$nodes]"; fi
}

write_files() {
  local ports i
  mkdir -p "$dir"/{etc,log,run,state,spool,gpus}
  [ -s "$dir/etc/munge.key" ] || head -c 1024 /dev/urandom >"$dir/etc/munge.key"
  mapfile -t ports < <(free_ports $((2 + nodes)))
  [ ${#ports[@]} = $((2 + nodes)) ] || fail "no $((2 + nodes)) ports between 20000 and 31999 are free"
  printf '%s\n' "${ports[*]}" >"$dir/ports"
  write_gpus
  write_database_conf "${ports[1]}"
  write_slurm_conf "${ports[@]}"
  cat >"$dir/env.sh" <<ENV
export SLURM_CONF=$SLURM_CONF
export MUNGE_SOCKET=$dir/run/munge
case :\$PATH: in *:/usr/sbin:*) ;; *) export PATH=\$PATH:/usr/sbin ;; esac
ENV
}

write_gpus() { # Slurm accepts only device files
  local i
  rm -f "$dir"/gpus/*
  echo "AutoDetect=off" >"$dir/etc/gres.conf"
  for ((i = 0; i < gpus; i++)); do
    mknod -m 666 "$dir/gpus/$i" c 1 3
    echo "NodeName=$(node_list) Name=gpu File=$dir/gpus/$i" >>"$dir/etc/gres.conf"
  done
}

write_database_conf() { # PORT
  cat >"$dir/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge
DbdHost=$(hostname -s)
DbdAddr=$address
DbdPort=$1
SlurmUser=root
CommunicationParameters=NoInAddrAny
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
CONF
}

write_slurm_conf() { # PORT...; time limits are generous: a busy machine must not look like a lost node
  local i
  cat >"$SLURM_CONF" <<CONF
ClusterName=$name
SlurmctldHost=$(hostname -s)($address)
SlurmctldPort=$1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge,cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
KillWait=30
CompleteWait=0
InactiveLimit=0
MinJobAge=86400
FirstJobId=$(($(date +%s) % 60000000))
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=60
TCPTimeout=10
BatchStartTimeout=120
UnkillableStepTimeout=120
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$address
AccountingStoragePort=$2
AccountingStoragePass=$dir/run/munge
AccountingStorageTRES=gres/gpu
NodeName=DEFAULT CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=4000 Gres=gpu:$gpus
PartitionName=DEFAULT Nodes=$(node_list) MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Default=NO PriorityTier=10 PreemptMode=OFF
CONF
  shift 2
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=n$i NodeHostname=$(hostname -s) NodeAddr=$address Port=$1"
    shift
  done >>"$SLURM_CONF"
}

# --- daemons ---

start_munged() { # --force: munged wants a socket that other users can reach
  rm -f "$dir/run/munge" "$dir/run/munge.lock"
  launch munged munged --force --key-file="$dir/etc/munge.key" --socket="$dir/run/munge" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/state/munge.seed" --num-threads=2
  wait_until munged eval "munge -S '$dir/run/munge' -n | unmunge -S '$dir/run/munge'"
}

start_mariadbd() { # reachable by a socket only, as root
  local options=(--no-defaults --user=root --innodb-log-file-size=16M)
  if [ ! -d "$dir/database" ]; then
    rm -rf "$dir/database.new"
    launch mariadbd mariadb-install-db "${options[@]}" --datadir="$dir/database.new" --skip-test-db --skip-name-resolve \
      --auth-root-authentication-method=socket
    mv "$dir/database.new" "$dir/database"
  fi
  rm -f "$dir/run/mariadb"
  launch mariadbd setsid --fork mariadbd "${options[@]}" --datadir="$dir/database" --skip-networking \
    --socket="$dir/run/mariadb" --pid-file="$dir/run/mariadbd.pid" --log-error="$dir/log/mariadbd.log" --skip-log-bin --performance-schema=OFF \
    --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0
  wait_until mariadbd test -S "$dir/run/mariadb"
}

start_accounting() {
  start_mariadbd
  launch slurmdbd env MYSQL_UNIX_PORT="$dir/run/mariadb" slurmdbd
  wait_until slurmdbd timeout 60 sacctmgr -n show cluster
  [ -n "$(sacctmgr -n show cluster "$name")" ] || launch slurmdbd sacctmgr -i add cluster "$name"
}

start_slurm() {
  local i
  launch slurmctld slurmctld
  wait_until slurmctld timeout 60 scontrol ping
  for ((i = 1; i <= nodes; i++)); do start_node "n$i"; done
  for ((i = 1; i <= nodes; i++)); do wait_until "n$i" node_accepts_jobs "n$i"; done
  wait_until slurmdbd accounting_answers
}

start_node() { # NODE
  launch "$1" slurmd -N "$1"
}

node_accepts_jobs() { # NODE
  case $(timeout 60 sinfo -h -p low -n "$1" -o %t) in
    idle | mix | alloc | comp) ;;
    *) return 1 ;;
  esac
}

accounting_answers() {
  timeout 60 sacct -n -X -o JobID
}

parts() {
  echo munged mariadbd slurmdbd slurmctld
  node_names
}

is_healthy() { # all parts run with the requested settings
  local part
  [ "$(cat "$dir/settings")" = "$settings" ] || return 1
  for part in $(parts); do [ -n "$(part_processes "$part")" ] || return 1; done
  for part in $(node_names); do node_accepts_jobs "$part" || return 1; done
  accounting_answers >/dev/null 2>&1
}

cancel_jobs() {
  [ -n "$(part_processes slurmctld)" ] && timeout 60 scontrol ping >/dev/null 2>&1 || return 0
  timeout 60 squeue -h -o %A | sort -u | xargs -r timeout 60 scancel 2>/dev/null || true
  for _ in {1..80}; do
    [ -n "$(timeout 60 squeue -h 2>/dev/null)" ] || return 0
    sleep 0.1
  done
}

end_parts() {
  local part
  for part in $(node_names); do end_all node_processes "$part"; done
  for part in slurmctld slurmdbd mariadbd munged; do end_all part_processes "$part"; done
}

# --- commands ---

start() { # DIR
  require_root
  mkdir -p -- "$1" 2>/dev/null || fail "cannot make the folder $1"
  folder "$1"
  settings="nodes $nodes cpus $cpus gpus $gpus host $(hostname)"
  if [ -f "$dir/settings" ]; then
    if ! programs_missing && is_healthy; then print_usage_hint && return; fi
  elif [ -n "$(ls -A "$dir")" ]; then
    fail "$dir contains other files; use a new or empty folder"
  fi
  lock_machine
  mkdir -p "$dir/log"
  echo "unfinished" >"$dir/settings"
  ! programs_missing || install_packages
  address=$(loopback_address)
  cancel_jobs
  end_parts
  trap 'end_parts; alone_with_hosts remove_node_names' EXIT
  write_files
  alone_with_hosts add_node_names
  start_munged
  start_accounting
  start_slurm
  trap - EXIT
  echo "$settings" >"$dir/settings"
  print_usage_hint
}

print_usage_hint() {
  echo "slurm_cluster: up with $(node_names); to use it: . $dir/env.sh"
}

kill_node() { # DIR NODE
  require_root
  existing_node "$@"
  freeze node_processes "$2"
  kill_all node_processes "$2"
  scontrol update NodeName="$2" State=DOWN Reason="power cut" 8>&- || fail "slurmctld does not set $2 DOWN"
  echo "slurm_cluster: $2 is dead"
}

revive_node() { # DIR NODE
  require_root
  existing_node "$@"
  [ -n "$(part_processes "$2")" ] || start_node "$2"
  wait_until "$2" node_accepts_jobs "$2"
  echo "slurm_cluster: $2 is up"
}

stop() { # DIR [--purge]
  require_root
  existing_cluster "$1"
  cancel_jobs
  end_parts
  alone_with_hosts remove_node_names
  [ "${2-}" != --purge ] || rm -rf -- "${dir:?}"/{database,database.new,etc,gpus,log,ports,run,spool,state,env.sh,settings}
  echo "slurm_cluster: nothing runs in $dir"
}

number() { # OPTION VALUE LEAST MOST
  if [[ ! $2 =~ ^[0-9]{1,3}$ ]] || [ "$2" -lt "$3" ] || [ "$2" -gt "$4" ]; then
    wrong_call "$1 is a number from $3 to $4, not '$2'"
  fi
}

start_options() { # OPTION VALUE ...
  nodes=2 cpus=4 gpus=2
  while [ $# -gt 0 ]; do
    case $1 in
      --nodes) number "$1" "${2-}" 1 64 && nodes=$2 ;;
      --cpus) number "$1" "${2-}" 1 256 && cpus=$2 ;;
      --gpus) number "$1" "${2-}" 0 16 && gpus=$2 ;;
      *) wrong_call "start has no option '$1'" ;;
    esac
    shift 2
  done
}

case ${1-}:$# in
  -h:1 | --help:1) help ;;
  start:[2-8])
    start_options "${@:3}"
    start "$2"
    ;;
  kill:3) kill_node "$2" "$3" ;;
  revive:3) revive_node "$2" "$3" ;;
  stop:2) stop "$2" ;;
  stop:3)
    [ "$3" = --purge ] || wrong_call "stop has no option '$3'"
    stop "$2" --purge
    ;;
  *) wrong_call "expected start DIR, stop DIR, kill DIR NODE or revive DIR NODE" ;;
esac
