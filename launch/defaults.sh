# shellcheck shell=bash
# Common code of the launch scripts: defaults, command-line parsing and forwarding of environment variables. The scripts
# source this file. Environment variables override the defaults.

repo=${HYPERMOE_REPOSITORY:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

venv=${HYPERMOE_VENV:-$repo/.venv}
if [ -x "$venv/bin/python" ]; then
    PATH=:$PATH:
    PATH=${PATH//":$venv/bin:"/:}
    PATH=$venv/bin${PATH%:}
    export PATH
elif [ -n "${HYPERMOE_VENV:-}" ]; then
    fail "HYPERMOE_VENV=$venv: has no bin/python; set it to the environment that launch/setup.sh created, or unset it"
fi

: "${HYPERMOE_HOSTFILE:=hostfile}"                           # hosts and their slots (ranks)
: "${HYPERMOE_DEEPSPEED_CONFIG:=$repo/ds_configs/zero1.json}" # default of --deepspeed_config
: "${MASTER_PORT:=29500}"                                    # rendezvous port; must differ between jobs
export MASTER_PORT
# Without keepalive messages, the launcher would hang if it lost the network connection.
: "${HYPERMOE_SSH_OPTIONS:=-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
export HYPERMOE_SSH_OPTIONS

# Pattern of valid host names. It excludes names that ssh, pdsh or a shell would interpret as an option or a pattern.
readonly host_name='[A-Za-z0-9_:][A-Za-z0-9_.:@-]*'

# check_rendezvous ADDRESS PORT: fail if the rendezvous address or port is invalid.
check_rendezvous() {
    [[ -z $1 || $1 =~ ^$host_name$ ]] || fail "MASTER_ADDR=$1: is not a host; set it to a name or an address"
    [[ $2 =~ ^[0-9]+$ ]] || fail "MASTER_PORT=$2: is not a number; set it to a free port"
}

# usage TEXT: print the help. A script accepts --hostfile and --num_gpus only if TEXT mentions them.
usage() {
    printf 'usage: %s\n\n' "$1"
    if [[ $1 == *--hostfile* ]]; then
        echo "  --hostfile FILE         file with lines 'host slots=RANKS' (HYPERMOE_HOSTFILE; default: hostfile)"
    fi
    if [[ $1 == *--num_gpus* ]]; then
        echo "  --num_gpus N            number of ranks on this host (default: one per GPU)"
    else
        echo "  --no-preflight          start without checking the hosts first"
    fi
    cat <<TEXT
  --verbose               show the libraries' output (HYPERMOE_LOG_LEVEL=info)
  --dry-run               check the settings and print the commands without running them
  --help                  show this help

These arguments are passed to pretrain/train.py: --config R.yaml, --deepspeed_config F.json
(default: ds_configs/zero1.json) and section.key=value. MASTER_ADDR and MASTER_PORT (default: 29500) set the rendezvous. See also docs/CLUSTERS.md.
TEXT
}

# read_command_line USAGE SET_BY ARGUMENT...: parse the command line. Set hostfile, num_gpus, dry_run, with_preflight,
# launcher_level (the log level of DeepSpeed's launcher) and train (the arguments of train.py). Error messages contain
# SET_BY, the name of the option or file that sets the hosts and the number of ranks.
read_command_line() {
    local text=$1 set_by=$2
    shift 2
    hostfile=$HYPERMOE_HOSTFILE num_gpus='' dry_run=false with_preflight=true train=()
    while [ $# -gt 0 ]; do
        case $1 in
            --hostfile | --config | --deepspeed_config) [ $# -gt 1 ] || fail "$1: no file is given; add its path" ;;
        esac
        case $1 in
            -h | --help) usage "$text" && exit 0 ;;
            --dry-run) dry_run=true ;;
            --no-preflight)
                [[ $text != *--num_gpus* ]] || fail "$1: is not an option; see --help"
                with_preflight=false
                ;;
            --verbose) export HYPERMOE_LOG_LEVEL=${HYPERMOE_LOG_LEVEL:-info} ;;
            --config | --deepspeed_config)
                train+=("$1" "$2")
                shift
                ;;
            --config=* | --deepspeed_config=*) train+=("$1") ;;
            --num_gpus | --num_gpus=*)
                [[ $text == *--num_gpus* ]] || fail "$1: is not an option; hosts and ranks are set by $set_by"
                [ "$1" != --num_gpus ] || shift
                num_gpus=${1#--num_gpus=}
                [[ $num_gpus =~ ^[1-9][0-9]*$ ]] || fail "--num_gpus $num_gpus: is not a number of ranks; give 1 or more"
                ;;
            --num_nodes*) fail "$1: is not an option; hosts and ranks are set by $set_by" ;;
            --hostfile | --hostfile=*)
                [[ $text == *--hostfile* ]] || fail "$1: is not an option; hosts and ranks are set by $set_by"
                [ "$1" != --hostfile ] || shift
                hostfile=${1#--hostfile=}
                ;;
            -*) fail "$1: is not an option; see --help" ;;
            *) train+=("$1") ;;
        esac
        shift
    done
    launcher_level=${HYPERMOE_LOG_LEVEL:-critical} launcher_level=${launcher_level,,} # the level critical prints nothing
    check_rendezvous "${MASTER_ADDR:-${PET_MASTER_ADDR:-}}" "${PET_MASTER_PORT:-$MASTER_PORT}"
    [[ " ${train[*]}" == *" --config"* ]] || fail "--config: is missing; give a recipe, such as one of pretrain/recipes"
    if [[ " ${train[*]}" != *" --deepspeed_config"* ]]; then
        train=(--deepspeed_config "$HYPERMOE_DEEPSPEED_CONFIG" "${train[@]}")
    fi
}

# read_hostfile: check the hostfile and set ranks to the sum of all slots.
read_hostfile() {
    [ -r "$hostfile" ] || fail "$hostfile: no such hostfile; copy launch/hostfile.example and list your hosts"
    local invalid
    invalid=$(grep -vnE "^[[:space:]]*(#.*)?\$|^[[:space:]]*${host_name}[[:space:]]+slots=[1-9][0-9]*[[:space:]]*(#.*)?\$" "$hostfile") &&
        invalid=${invalid%%$'\n'*} && fail "$hostfile:${invalid%%:*}: '${invalid#*:}' is not a host; write NAME slots=N"
    ranks=$(sed -nE 's/^[^#]*slots=([0-9]+).*/\1/p' "$hostfile" | awk '{ sum += $1 } END { print sum + 0 }')
    [ "$ranks" -gt 0 ] || fail "$hostfile: names no host; write 'host slots=RANKS'"
}

# needs COMMAND PACKAGE...: fail if a required command is missing.
needs() {
    $dry_run || command -v "$1" >/dev/null || fail "$1: not found; install $2"
}

# forwarded_names: print the names of all environment variables that are set and forwarded.
forwarded_names() {
    compgen -e | grep -E -f "$repo/launch/forwarded_environment.txt" | LC_ALL=C sort
}

# write_environment: set environment to the forwarded NAME=VALUE pairs, and write the pairs to environment_file in
# DeepSpeed's format (DS_ENV_FILE). The user's .deepspeed_env files in the home directory and the working directory
# override these values. The name of environment_file contains a checksum of its content, so that jobs that start at the
# same time do not overwrite each other's file.
write_environment() {
    local file name value
    local -A values=()
    for name in $(forwarded_names); do
        [[ ${!name} != *$'\n'* ]] || fail "$name: has more than one line and cannot be forwarded to other hosts; unset it"
        if [ -n "${!name}" ]; then values[$name]=${!name}; fi
    done
    for file in "${HOME:-.}/.deepspeed_env" "${DS_ENV_FILE:-.deepspeed_env}"; do
        if [ ! -f "$file" ]; then continue; fi
        while IFS='=' read -r name value || [ -n "$name" ]; do
            [[ $name =~ ^[A-Za-z_][A-Za-z_0-9]*$ ]] || fail "$file: '$name' is not a variable; write one NAME=VALUE per line"
            values[$name]=$value
        done <"$file"
    done
    environment=()
    for name in $(printf '%s\n' "${!values[@]}" | LC_ALL=C sort); do environment+=("$name=${values[$name]}"); done
    environment_file=$repo/build/launch/environment.$(printf '%s\n' "${environment[@]}" | cksum | cut -d ' ' -f 1)
    if $dry_run; then
        printf "# $environment_file: %s\n" "${environment[@]}"
    else
        mkdir -p "$repo/build/launch"
        (umask 077 && printf '%s\n' "${environment[@]}" >"$environment_file")
    fi
}

# announce COMMAND...: print a command so that it can be pasted into a shell.
announce() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

# run [exec] COMMAND...: print a command, and run it unless --dry-run is given.
run() {
    local how=()
    if [ "$1" = exec ]; then
        how=(exec)
        shift
    fi
    announce "$@"
    if $dry_run; then return; fi
    "${how[@]}" "$@"
}

# preflight ARGUMENT...: check the hosts before the job starts, or only the settings with --dry-run. If a check fails,
# the script exits.
preflight() {
    if $dry_run; then
        command -v python >/dev/null || fail "python: not found; build the environment: bash launch/setup.sh"
        python "$repo/tools/preflight.py" --dry-run "$@" "${train[@]}" || exit
    fi
    if $with_preflight; then run python "$repo/tools/preflight.py" "$@" "${train[@]}"; fi
}
