#!/usr/bin/env bash
# Train with torchrun on this host. To train on several hosts, run this script on each of them.
#
# NPROC_PER_NODE sets the number of ranks on this host (default: one per GPU; required without GPUs). For several hosts,
# also set NNODES, NODE_RANK and MASTER_ADDR (the address of the host with NODE_RANK=0). Kubernetes' training operator
# sets PET_* variables with the same meaning.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

read_command_line "[NNODES=N NODE_RANK=R MASTER_ADDR=HOST] bash launch/torchrun.sh --config R.yaml [section.key=value ...]" \
    "NNODES and NPROC_PER_NODE" "$@"
nodes=${NNODES:-${PET_NNODES:-1}} per_node=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-gpu}}
address=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
[ "$nodes" = 1 ] || [ -n "$address" ] || fail "NNODES=$nodes: MASTER_ADDR is not set; set it to the host of NODE_RANK=0"
needs torchrun "the environment: bash launch/setup.sh"
if ! $dry_run && [ "$per_node" = gpu ]; then # without a GPU, torchrun would fail with a traceback
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "NPROC_PER_NODE: is ${NPROC_PER_NODE:-not set} and this host has no GPU; set it to the number of ranks on this host"
fi
preflight --slots "$per_node"
# Without --log_dir, torchrun leaves an empty folder in TMPDIR.
run exec torchrun --nnodes "$nodes" --node_rank "${NODE_RANK:-${PET_NODE_RANK:-0}}" --nproc_per_node "$per_node" \
    --master_addr "${address:-127.0.0.1}" --master_port "${PET_MASTER_PORT:-$MASTER_PORT}" --log_dir /dev/null \
    "$repo/pretrain/train.py" "${train[@]}"
