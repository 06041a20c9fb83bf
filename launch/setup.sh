#!/usr/bin/env bash
# usage: bash launch/setup.sh [EXTRA ...]
#
# Install HyperMoE-DS into a virtual environment. If the installation is up to date, this takes less than a second.
#
#   EXTRA                 dev (tests and linters), bench (plots), eval (lm-evaluation-harness), mpi (mpirun), gpu (CUDA
#                         kernels; added automatically if nvidia-smi lists a GPU). Extras installed earlier are kept.
#   HYPERMOE_VENV=DIR     the environment to create or use (default: .venv in the repository)
set -euo pipefail

if [[ " $* " =~ " "(-h|--help)" " ]]; then sed -n '/^set /q; 2,$s/^# \{0,1\}//p' "$0" && exit; fi

readonly TORCH="torch==2.13.0" # installed first, so that other packages build and resolve against it
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${HYPERMOE_VENV:-$repo/.venv}
mkdir -p "$(dirname "$venv")"
venv=$(cd "$(dirname "$venv")" && pwd)/$(basename "$venv")
stamp=$venv/hypermoe-setup.stamp # line 1: the extras; line 2: a hash of everything that determines the installation
log=$venv/hypermoe-setup.log

die() {
    echo "setup: $1" >&2
    exit 1
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "$venv/bin/python" python3.11 python3 python3.12 python3.13; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]]; }

wanted_extras() {
    {
        printf '%s\n' "$@"
        if [ -f "$stamp" ]; then head -n 1 "$stamp" | tr ',' '\n'; fi
        if has_gpu; then echo gpu; fi
    } | sed '/^$/d' | sort -u | paste -sd, -
}

fingerprint() {
    { "$python" -VV && echo "$extras $repo" && cat "$repo/pyproject.toml" "$repo/constraints.txt" "$repo/launch/setup.sh"; } | sha256sum
}

check_system() {
    local missing=0
    lacks() {
        echo "setup: missing $1; install it with: $2" >&2
        missing=1
    }
    if [ -x "$venv/bin/python" ] && ! is_supported "$venv/bin/python"; then
        die "$venv has $("$venv/bin/python" -V 2>&1), but Python 3.11 to 3.13 is needed; remove it or set HYPERMOE_VENV"
    fi
    if [ -z "$python" ]; then
        lacks "Python 3.11, 3.12 or 3.13" "apt-get install python3 python3-venv python3-dev"
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            lacks "the venv module of $python" "apt-get install python3-venv"
        "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
            lacks "the headers of $python (DeepSpeed compiles its operators at first use)" "apt-get install python3-dev"
    fi
    command -v "${CXX:-c++}" >/dev/null ||
        lacks "the C++ compiler ${CXX:-c++} (DeepSpeed compiles its operators at first use)" "apt-get install g++"
    [ "$missing" = 0 ] || exit 1
}

check_extras() {
    local extra
    for extra in "$@"; do
        case $extra in
            bench | dev | eval | gpu | mpi) ;;
            *) die "unknown extra '$extra'; choose from bench, dev, eval, gpu, mpi" ;;
        esac
    done
}

# stage TEXT COMMAND...: print TEXT, write the command's output to the log, and show the end of the log on failure.
stage() {
    local started=$SECONDS
    printf 'setup: %s ... ' "$1"
    shift
    if "$@" >>"$log" 2>&1; then
        echo "$((SECONDS - started)) s"
    else
        echo "failed"
        tail -n 15 "$log" >&2
        die "the last command failed; the full output is in $log"
    fi
}

make_venv() {
    # Never delete an existing folder. If HYPERMOE_VENV is wrong, the folder contains other files of the user.
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        die "$venv is not a virtual environment; remove it or set HYPERMOE_VENV to another folder"
    fi
    if [ ! -x "$venv/bin/pip" ]; then
        echo "setup: creating a virtual environment in $venv"
        "$python" -m venv "$venv"
    fi
    python=$venv/bin/python
    : >"$log"
}

pip_install() {
    "$python" -m pip install --disable-pip-version-check --no-input --constraint "$repo/constraints.txt" "$@"
}

# Without a GPU, every process group loads DeepSpeed's shared-memory operator, which must be compiled first. Compiling
# the operator here saves a minute at the first launch. Operators are cached per environment, because two environments
# that share torch's per-user cache would keep rebuilding them.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}

communication_is_compiled() { [ -f "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/deepspeed_shm_comm.so" ]; }

compile_communication() {
    PATH="$venv/bin:$PATH" DS_ACCELERATOR=cpu "$python" -c \
        'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder
from hypermoe_ds.training.operators import without_stale_locks
with without_stale_locks(): Builder().load()'
}

install() {
    check_system
    make_venv
    stage "pip and build tools" pip_install --upgrade pip "setuptools>=77" wheel ninja packaging py-cpuinfo
    stage "$TORCH" pip_install "$TORCH"
    export DS_BUILD_OPS=0 # operators are compiled at first use, so the installation does not need the CUDA toolkit
    stage "HyperMoE-DS${extras:+ with $extras}" pip_install --no-build-isolation --editable "$repo${extras:+[$extras]}"
    printf '%s\n%s\n' "$extras" "$(fingerprint)" >"$stamp"
}

check_extras "$@"
python=$(find_python)
extras=$(wanted_extras "$@")
if [ -z "$python" ] || [ ! -f "$stamp" ] || [ "$(tail -n 1 "$stamp")" != "$(fingerprint)" ]; then
    install
fi
if ! has_gpu && ! communication_is_compiled; then
    stage "DeepSpeed's communication operator" compile_communication
fi
echo "setup: ready${extras:+ with $extras}; use it with: source $venv/bin/activate"
