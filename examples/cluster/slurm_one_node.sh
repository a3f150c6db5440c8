#!/bin/bash
# A run on one Slurm node: no Ray to start, the run starts its own. For several nodes see slurm.sh.
#
#   RUN=/shared/runs/mri sbatch examples/cluster/slurm_one_node.sh +experiment=medvqa_600 profile=paper
#
# RUN is the run's folder. Arguments after the script's name go to rlmed.launch; without GPUs to share out, cluster=local
# (`sbatch --gpus-per-node=1 examples/cluster/slurm_one_node.sh ... cluster=local`) is the fastest.
# PYTHON is an interpreter with rlmed[ray] installed.
#SBATCH --job-name=rlmed
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
# After a requeue, the same command continues from the last checkpoint (resume=auto below).
#SBATCH --requeue
set -euo pipefail

RUN=${RUN:?set RUN to the folder of the run}
PYTHON=${PYTHON:-python}
TRIES=${TRIES:-3} # launches after which a lost learner rank ends the job

export RAY_USAGE_STATS_ENABLED=0

# Exit status 3: the run lost a process; the same command continues from the last checkpoint.
for ((try = 1; ; try++)); do
    status=0
    # in the background, because the shell handles signals only while it waits
    "$PYTHON" -m rlmed.launch cluster=ray_8gpu "$@" "hydra.run.dir=$RUN" resume=auto &
    run=$!
    trap 'kill $run 2>/dev/null; wait $run; exit 143' TERM INT
    wait $run || status=$?
    ((status == 3 && try < TRIES)) || exit "$status"
done
