#!/usr/bin/env bash
# The recipe's environment -> torchrun's flags (torchrun itself ignores these variables).
#   NNODES=2 NODE_RANK=0 NPROC_PER_NODE=8 MASTER_ADDR=host MASTER_PORT=29500 \
#       train/launch.sh --config configs/stage1.yaml --model ... --dataset ... --output_dir ...
# A signal is passed on to the ranks, which save; what still runs after SHUTDOWN_TIMEOUT seconds
# (300; torchrun's own 30 are short for a large checkpoint) is killed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
default_processes=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
exec torchrun \
    --nnodes "${NNODES:-1}" \
    --node_rank "${NODE_RANK:-0}" \
    --nproc_per_node "${NPROC_PER_NODE:-$((default_processes > 0 ? default_processes : 1))}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "${MASTER_PORT:-29500}" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown_timeout "${SHUTDOWN_TIMEOUT:-300}" \
    "$here/sft.py" "$@"
