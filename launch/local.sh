#!/usr/bin/env bash
# Train on this host with DeepSpeed's launcher. The launcher's log is written to a file, so that an error of the run is
# the last line on the terminal.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

read_command_line "bash launch/local.sh [--num_gpus N] --config R.yaml [section.key=value ...]" "--num_gpus" "$@"
needs deepspeed "the environment: bash launch/setup.sh"
# Check the settings and paths first. This takes a second, because it does not import torch, while DeepSpeed's launcher
# takes several seconds to start a rank.
run_dir=$(python "$repo/pretrain/train.py" --check "${train[@]}") || exit
if [ "$launcher_level" = critical ]; then # the user did not request the launcher's log
    launcher_level=info launcher_log=$run_dir/logs/launcher.log
fi
run exec deepspeed --log_level "$launcher_level" ${num_gpus:+--num_gpus "$num_gpus"} --master_port "$MASTER_PORT" \
    "$repo/pretrain/train.py" "${train[@]}"
