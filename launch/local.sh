#!/usr/bin/env bash
# Train on this host with DeepSpeed's launcher. The launcher's log goes to a file, so an error is the last line shown.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

read_command_line "bash launch/local.sh [--num_gpus N] --config R.yaml [section.key=value ...]" "--num_gpus" "$@"
needs deepspeed "the environment: bash launch/setup.sh"
# Check in a second what does not need torch, because DeepSpeed's launcher takes several seconds to start a rank.
run_dir=$(python "$repo/pretrain/train.py" --check "${train[@]}") || exit
if [ "$launcher_level" = critical ]; then # the user did not ask for the launcher's log
    launcher_level=info launcher_log=$run_dir/logs/launcher.log
fi
run exec deepspeed --log_level "$launcher_level" ${num_gpus:+--num_gpus "$num_gpus"} --master_port "$MASTER_PORT" \
    "$repo/pretrain/train.py" "${train[@]}"
