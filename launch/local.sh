#!/usr/bin/env bash
# Train on this host with DeepSpeed's launcher. The launcher's log is written to a file, so that an error of the run is
# the last line on the terminal. A stop signal, such as Ctrl-C, reaches the ranks: they save a checkpoint and exit.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

# keep_output LOG: keep stdout and stderr for the ranks as descriptors 3 and 4, and write the launcher's output to LOG.
# DeepSpeed's launcher passes on descriptors 0 to 2 only, so the ranks find the others through HYPERMOE_SCREEN. A regular
# file gets its lines through a pipe: a rank that opened the file itself would have its own write position, and later
# output of the caller would overwrite the rank's lines.
keep_output() {
    exec 3>&1 4>&2
    copies=()
    if [ -f /dev/stdout ]; then
        copy_to 1
        exec 3>"$pipe"
        rm "$pipe"
    fi
    if [ -f /dev/stderr ]; then
        copy_to 2
        exec 4>"$pipe"
        rm "$pipe"
    fi
    mkdir -p "$(dirname "$1")"
    export HYPERMOE_SCREEN=/proc/$$/fd
    exec >>"$1" 2>&1
}

# copy_to DESCRIPTOR: start a process that copies a new named pipe to a descriptor, and set pipe to the pipe's path.
copy_to() {
    pipe=$(mktemp -u)
    mkfifo -m 600 "$pipe"
    (trap '' INT TERM HUP USR1 && exec cat "$pipe" >&"$1" 3>&- 4>&-) &
    copies+=($!)
}

# shellcheck disable=SC2329 # called by `stop`
children() { cat /proc/"$1"/task/*/children 2>/dev/null || true; }

# stop: send SIGTERM to the ranks, or to the launcher's processes if they have not started a rank. The launcher would not
# forward the signal. It runs in its own session, so that Ctrl-C does not reach it.
# shellcheck disable=SC2329 # called by the trap
stop() {
    local starter process ranks=''
    interrupted=true
    starter=$(children "$launcher")
    for process in $starter; do ranks+=$(children "$process"); done
    # shellcheck disable=SC2086 # lists of process ids
    kill -s TERM ${ranks:-$starter $launcher} 2>/dev/null || true
}

# wait_for_launcher: set code to its exit code. A signal interrupts `wait`.
wait_for_launcher() {
    interrupted=true code=0
    while $interrupted; do
        interrupted=false code=0
        wait "$launcher" || code=$?
    done
}

read_command_line "bash launch/local.sh [--num_gpus N] --config R.yaml [section.key=value ...]" "--num_gpus" "$@"
needs deepspeed "the environment: bash launch/setup.sh"
# Check the settings and paths first. This takes a second, because it does not import torch, while DeepSpeed's launcher
# takes several seconds to start a rank.
run_dir=$(python "$repo/pretrain/train.py" --check "${train[@]}") || exit
log=
if [ "$launcher_level" = critical ]; then # the user did not request the launcher's log
    launcher_level=info log=$run_dir/logs/launcher.log
fi
command=(deepspeed --log_level "$launcher_level" ${num_gpus:+--num_gpus "$num_gpus"} --master_port "$MASTER_PORT"
    "$repo/pretrain/train.py" "${train[@]}")
announce "${command[@]}"
if $dry_run; then exit; fi
if [ -n "$log" ]; then keep_output "$log"; fi
setsid "${command[@]}" &
launcher=$!
trap stop INT TERM HUP USR1
wait_for_launcher
if [ -n "$log" ]; then
    exec 3>&- 4>&-
    wait "${copies[@]}" || true
fi
exit "$code"
