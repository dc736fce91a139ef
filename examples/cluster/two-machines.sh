#!/bin/bash
# One run on two machines, with torchrun alone. Run the same command on both, within a few minutes:
#
#     bash two-machines.sh FIRST [ARGUMENTS...]
#
# FIRST is the name or address of one of them, reachable from the other (port 29500). ARGUMENTS go to `pretrain train`.
# The text and the run directory must be at the same path on both, on a shared file system.
set -euo pipefail

first=${1:?"usage: two-machines.sh FIRST [ARGUMENTS...]"}
shift

exec torchrun --nnodes 2 --nproc-per-node gpu \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id pretrain \
    --max-restarts 3 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m pretrain train nanochat --out /shared/runs/two-machines "$@"
