#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's own launcher, over pdsh and ssh.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

read_command_line "bash launch/pdsh.sh [--hostfile FILE] --config R.yaml [section.key=value ...]" \
    "the slots in the hostfile" "$@"
read_hostfile
needs deepspeed "the environment: bash launch/setup.sh"
needs pdsh "it: apt-get install pdsh"
needs ssh "it: apt-get install openssh-client"
write_environment
preflight --hostfile "$hostfile" --environment "$environment_file"
# Ctrl-C on this command ends every DeepSpeed job of this Python on the hosts: see docs/CLUSTERS.md
run exec env "DS_ENV_FILE=$environment_file" "PDSH_SSH_ARGS_APPEND=$HYPERMOE_SSH_OPTIONS" \
    deepspeed --force_multi --hostfile "$hostfile" --launcher pdsh ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --master_port "$MASTER_PORT" "$repo/pretrain/train.py" "${train[@]}"
