#!/usr/bin/env bash
# The same by torchrun, with no Accelerate config: one machine, or several that start this script each.
#
#     train/launch/torchrun.sh vit-b-32 --shards my/shards --out my/train --sampler.batch-size 2048
#
# Several machines: NODES=2 NODE=0 HEAD=10.0.0.1 on the first, NODE=1 on the second. PROCESSES is a machine's
# number of GPUs. On CPUs: ACCELERATE_USE_CPU=true PROCESSES=2. FSDP2 wants a config file: see fsdp2.yaml.
#
# Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint: torchrun passes them on, and ends what is still there after
# GRACE_S seconds. torchrun itself then ends with a traceback and status 1. The same command with
# --resume goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."

export ACCELERATE_MIXED_PRECISION="${ACCELERATE_MIXED_PRECISION:-bf16}"
exec torchrun \
    --nnodes "${NODES:-1}" \
    --node-rank "${NODE:-0}" \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --master-addr "${HEAD:-127.0.0.1}" \
    --master-port "${PORT:-29500}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout "${GRACE_S:-300}" \
    train/contrastive.py "$@"
