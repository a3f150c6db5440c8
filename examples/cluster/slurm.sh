#!/bin/bash
# A run on several Slurm nodes: Ray's head on the first, one Ray node on each of the others, the run beside the head.
#
#   RUN=/shared/runs/mri sbatch examples/cluster/slurm.sh +experiment=medvqa_600 profile=paper model.device=cuda \
#       cluster.rollout_workers=12 cluster.learner_ranks=4
#
# RUN is the run's folder, on a disk that all nodes share. Arguments after the script's name go to rlmed.launch.
# PYTHON is an interpreter with rlmed[ray] installed, at the same path on every node.
#SBATCH --job-name=rlmed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
# After a requeue, the same command continues from the last checkpoint (resume=auto below).
#SBATCH --requeue
# The loss of one node does not end the job: the other workers sample its groups.
#SBATCH --no-kill
set -euo pipefail

RUN=${RUN:?set RUN to the folder of the run, on a disk that all nodes share}
PYTHON=${PYTHON:-python}
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
TRIES=${TRIES:-3} # launches after which a lost learner rank ends the job

export RAY_USAGE_STATS_ENABLED=0
# All nodes need the same token; srun passes on the environment.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

# srun does not take --cpus-per-task from sbatch since Slurm 22.05: every Ray node would have one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

ray() { "$PYTHON" -m ray.scripts.scripts "$@"; }
on() { # on NODE COMMAND...: in the background, for as long as the job lasts
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --no-kill --kill-on-bad-exit=0 "$@" &
}

# when this script ends, for whatever reason, stop Ray on all nodes
cleanup() {
    trap - EXIT TERM INT
    # shellcheck disable=SC2046 # one word for each process
    kill $(jobs -p) 2>/dev/null || true
    wait || true
}
trap cleanup EXIT
trap 'exit 143' TERM INT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# the address of its name; where that is the loopback's, as in Debian's /etc/hosts, that of its first network
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap bash -c 'hostname --ip-address; hostname --all-ip-addresses' |
    tr ' ' '\n' | grep -v -e : -e '^127\.' -e '^$' | head -n 1) || true
[[ -n $ip ]] || { echo "$head has no IPv4 address but the loopback's: set its name's in /etc/hosts" >&2; exit 1; }
address=$ip:$PORT

on "$head" "$PYTHON" -m ray.scripts.scripts start --head --node-ip-address="$ip" --port="$PORT" \
    --include-dashboard=false --block
ray_head=$!
for ((second = 0; ; second += 2)); do
    ray health-check --address "$address" 2>/dev/null && break
    ((second < 120)) || { echo "Ray's head does not answer at $address" >&2; exit 1; }
    sleep 2
done
for node in "${nodes[@]:1}"; do
    on "$node" "$PYTHON" -m ray.scripts.scripts start --address="$address" --block
done

# Exit status 3: the run lost a process; the same command continues from the last checkpoint.
for ((try = 1; ; try++)); do
    status=0
    # in the background, because the shell handles signals only while it waits, and to notice the head's end
    "$PYTHON" -m rlmed.launch cluster=ray_multinode "$@" "cluster.address=$address" "hydra.run.dir=$RUN" resume=auto &
    wait -n $! "$ray_head" || status=$?
    kill -0 "$ray_head" 2>/dev/null || { echo "Ray's head has ended" >&2; exit 1; }
    ((status == 3 && try < TRIES)) || exit "$status"
done
