#!/usr/bin/env bash
# A training job on SLURM that outlives its time limit and preemptions. From the root of the repository:
#
#     sbatch train/launch/slurm.sh vit-b-32 --shards /shared/shards --out /shared/train \
#         --sampler.batch-size 4096
#
# Adjust the lines below to the cluster. --out and this folder must be on a disk that all nodes see.
#SBATCH --job-name=mmrec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# SLURM signals the tasks two minutes before the end, and the job is queued again.
#SBATCH --signal=USR1@120
#SBATCH --requeue
set -euo pipefail

# One task is one process with one GPU. No launcher stands in between, so signals reach the training
# itself: at SIGUSR1 or SIGTERM all ranks finish the same step, save a checkpoint, and exit with
# 138 or 143 (128 and the signal's number).
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export ACCELERATE_MIXED_PRECISION="${ACCELERATE_MIXED_PRECISION:-bf16}"

# --resume starts the run where there is no checkpoint yet, and goes on where there is one.
status=0
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec .venv/bin/python train/contrastive.py "$@" --resume
' train "$@" || status=$?

if [[ $status -eq 138 || $status -eq 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
