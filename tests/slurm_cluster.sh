#!/bin/bash
# A real Slurm cluster on one machine, for test_slurm.py. It needs root and Debian's packages
# slurmctld, slurmd, slurm-client, munge and iproute2.
#   slurm_cluster.sh head DIR NODES   runs the head node (munged, slurmctld, bridge) until killed
#   slurm_cluster.sh boot DIR I       boots node I; to be called in the head's namespaces
#   slurm_cluster.sh kill DIR I       cuts the power of node I; to be called there too
# The head is process 1 of new process, network, mount and host-name namespaces. Every node is the
# same inside the head's namespaces. So ports collide only where they would on real machines, and
# killing the head leaves neither daemons nor a bridge behind.
set -euo pipefail
command=$1
dir=$2
export SLURM_CONF=$dir/slurm.conf
machine=(unshare --net --mount --uts --pid --fork --kill-child --mount-proc --propagation private)

write_conf() {
  mkdir -p "$dir"/{state,spool,munge,dev}
  (umask 077; head -c 128 /dev/urandom > "$dir/munge/key")
  # A GPU must be a character device, but Slurm never opens it.
  for i in $(seq 0 7); do ln -s /dev/null "$dir/dev/gpu$i"; done
  {
    echo "127.0.0.1 localhost"
    echo "10.77.0.1 head"
    for i in $(seq "$1"); do echo "10.77.0.$((i + 10)) node$i"; done
  } > "$dir/hosts"
  echo "NodeName=node[1-$1] Name=gpu File=$dir/dev/gpu[0-7]" > "$dir/gres.conf"
  cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=10
KillWait=10
NodeName=node[1-$1] NodeAddr=10.77.0.[11-$((10 + $1))] CPUs=16 RealMemory=16000 Gres=gpu:8
PartitionName=dev Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
CONF
}

case $command in
  head)
    write_conf "$3"
    mount --bind "$dir/hosts" /etc/hosts
    hostname head
    ip link set lo up
    ip link add switch type bridge
    ip addr add 10.77.0.1/24 dev switch
    ip link set switch up
    munged --foreground --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
      --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" &
    until [ -S "$dir/munge/socket" ]; do sleep 0.05; done
    slurmctld -D &
    for i in $(seq "$3"); do bash "$0" boot "$dir" "$i"; done
    wait
    ;;
  boot)
    setsid "${machine[@]}" bash -c "
      hostname node$3
      ip link set lo up
      until ip link show eth0; do sleep 0.02; done
      ip addr add 10.77.0.$((10 + $3))/24 dev eth0
      ip link set eth0 up
      slurmd -D -N node$3
      sleep infinity" </dev/null >>"$dir/node$3.out" 2>&1 &
    echo $! > "$dir/node$3.pid"
    # After a reboot, wait until the kernel has removed the old network port.
    while ip link show "port$3" >/dev/null 2>&1; do sleep 0.1; done
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do
      sleep 0.02
    done
    ip link add "port$3" type veth peer name eth0 netns $!
    ip link set "port$3" master switch up
    ;;
  kill)
    kill -KILL "$(cat "$dir/node$3.pid")"
    ;;
esac
