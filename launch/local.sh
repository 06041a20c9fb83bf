#!/usr/bin/env bash
# Trains on this host with DeepSpeed's launcher, whose own log stays off the screen: a mistake is its last line.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

read_command_line "bash launch/local.sh [--num_gpus N] --config R.yaml [section.key=value ...]" "--num_gpus" "$@"
needs deepspeed "the environment: bash launch/setup.sh"
# In a second what needs no torch: DeepSpeed's launcher takes seconds before a rank starts.
run_dir=$(python "$repo/pretrain/train.py" --check "${train[@]}") || exit
if [ "$launcher_level" = critical ]; then # nobody asks for its log on the screen
    launcher_level=info launcher_log=$run_dir/logs/launcher.log
fi
run exec deepspeed --log_level "$launcher_level" ${num_gpus:+--num_gpus "$num_gpus"} --master_port "$MASTER_PORT" \
    "$repo/pretrain/train.py" "${train[@]}"
