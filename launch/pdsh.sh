#!/usr/bin/env bash
# Train on the hosts of a hostfile with DeepSpeed's launcher, over pdsh and ssh.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

# DeepSpeed joins all arguments into one command line. pdsh expands %h, %n and %u in this line, and each host's shell
# parses the line again. DeepSpeed quotes arguments that contain a space and escapes double quotes in these arguments.
# DeepSpeed also quotes the values of environment variables, but does not escape double quotes in these values.

# in_double_quotes TEXT: escape TEXT for use inside double quotes. Double quotes in TEXT are not escaped.
in_double_quotes() { printf '%s' "${1//%/%%}" | sed 's/[\\$`]/\\&/g'; }

# quoted WORD: quote WORD so that it reaches train.py unchanged.
quoted() {
    if [[ $1 =~ ^[A-Za-z0-9_@+=:,./-]+$ ]]; then
        printf '%s' "$1"
    elif [[ $1 == *" "* ]]; then
        in_double_quotes "$1"
    else
        printf "'%s'" "$(printf '%s' "${1//%/%%}" | sed "s/'/'\\\\''/g")"
    fi
}

read_command_line "bash launch/pdsh.sh [--hostfile FILE] --config R.yaml [section.key=value ...]" \
    "the slots in the hostfile" "$@"
read_hostfile
needs deepspeed "the environment: bash launch/setup.sh"
needs pdsh "it: apt-get install pdsh"
needs ssh "it: apt-get install openssh-client"
for path in "$PWD" "$repo" "$venv"; do # the launcher does not quote these paths
    [[ $path =~ ^[A-Za-z0-9_@+=:,./-]*$ ]] ||
        fail "'$path': cannot be passed to other hosts; use a path of letters, digits and _@+=:,.-"
done
words=()
for word in "${train[@]}"; do
    [[ $word != *$'\n'* ]] || fail "'$word': has more than one line and cannot be passed to other hosts; put it into the recipe"
    words+=("$(quoted "$word")")
done
write_environment
preflight --hostfile "$hostfile" --environment "$environment_file"
if ! $dry_run; then
    for variable in "${environment[@]}"; do
        printf '%s=%s\n' "${variable%%=*}" "$(in_double_quotes "${variable#*=}" | sed 's/"/\\"/g')"
    done | (umask 077 && cat >"$environment_file.pdsh")
fi
kept=() # the launcher would also forward these variables, without quoting their values
for name in $(compgen -e | grep -E '^(MLFLOW|MV2|PYTHON)' | grep -vEf "$repo/launch/forwarded_environment.txt"); do kept+=(-u "$name"); done
# Ctrl-C on this command ends all DeepSpeed jobs on these hosts that use the same Python: see docs/CLUSTERS.md
run exec env "${kept[@]}" "DS_ENV_FILE=$environment_file.pdsh" "PDSH_SSH_ARGS_APPEND=$HYPERMOE_SSH_OPTIONS" \
    deepspeed --log_level "$launcher_level" --force_multi --hostfile "$hostfile" --launcher pdsh ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --master_port "$MASTER_PORT" "$repo/pretrain/train.py" "${words[@]}"
