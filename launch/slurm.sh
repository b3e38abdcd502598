#!/bin/bash
# Trains on 16 machines of 8 GPUs under SLURM, through pre-emptions and time limits, to the end:
#
#     sbatch launch/slurm.sh RUN RECIPE [OPTION ...]
#     sbatch launch/slurm.sh runs/a megdet:batch_256_bn_16 --data.train data/train --data.val data/val
#     sbatch --nodes=1 launch/slurm.sh runs/b megdet:batch_16_bn_16 --data.train data/train
#
# RUN and the data lie on storage that all machines see; gesso and torchrun are on PATH (activate the environment before
# sbatch, which hands it on). The script may be started again at any time: it begins the run, or goes on with it.
# PROCESSES_PER_NODE=8 sets the processes of a machine, where it is not one for each GPU. docs/distributed.md says more.
#
#SBATCH --job-name=gesso
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# 120 s before the time limit torchrun on each machine gets SIGTERM, as it does at a pre-emption, and hands it on to its
# processes, which finish their step, save and leave. Not B:TERM, which only this shell would get: srun turns a SIGTERM
# of its own into SIGKILL for all.
#SBATCH --signal=TERM@120
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: sbatch launch/slurm.sh RUN RECIPE [OPTION ...]" >&2
    exit 2
fi
run=$1 recipe=$2
shift 2

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds that torchrun waits for its processes to save; older versions of torch wait 30, whatever this says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}

# Each process looks for the run when it starts, also when torchrun starts it again after a failure. At the first start
# all find none: process 0 makes the folder only after all have joined.
# shellcheck disable=SC2016  # the process's own shell fills it in
worker='run=$1; shift; [ -e "$run/config.json" ] && set -- "$@" --resume; exec gesso train "$@" --out "$run"'

saved() { cat "$run/checkpoints/latest.json" 2>/dev/null || true; }

before=$(saved)
status=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
    torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${PROCESSES_PER_NODE:-gpu}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${machines[0]}:$((29400 + SLURM_JOB_ID % 1000))" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 \
    --no-python bash -c "$worker" worker "$run" "$recipe" "$@" || status=$?

# A stopped or failed run that got further than before is put into the queue again; one that did not would only fail
# again. scancel ends this shell before it comes here, and so the job.
if [[ $status -ne 0 && $(saved) != "$before" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
