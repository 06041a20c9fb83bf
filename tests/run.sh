#!/usr/bin/env bash
# Set up the environment, then run the linters, the type checker and the tests. If a check fails, the others still run.
#
#   bash tests/run.sh [PYTEST ARGUMENT ...]     e.g. tests/unit, -k routing, -m slow
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
bash launch/setup.sh dev mpi || exit 1
venv=${HYPERMOE_VENV:-$PWD/.venv}
PATH=$(cd "$venv/bin" && pwd):$PATH
export PATH
export OMP_NUM_THREADS=1 # the ranks of a test share the CPU cores
export HF_HUB_OFFLINE=1  # no test needs the network
[[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]] || export DS_ACCELERATOR=cpu

failed=()

# check NAME COMMAND...: run one check, print its result and duration, and record a failure.
check() {
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    if "$@"; then
        echo "== $name: ok, $((SECONDS - started)) s"
    else
        echo "== $name: FAILED, $((SECONDS - started)) s"
        failed+=("$name")
    fi
}

parse_scripts() {
    local script status=0
    for script in "${scripts[@]}"; do
        bash -n "$script" || status=1
    done
    return "$status"
}

# Include untracked files, and exclude deleted files that git still lists.
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard '*.sh' '*.sbatch' .ci/run |
    while read -r file; do if [ -f "$file" ]; then echo "$file"; fi; done)

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "bash -n" parse_scripts
check "shellcheck" shellcheck "${scripts[@]}"
check "hadolint" hadolint Dockerfile
check "pytest" python -m pytest "$@" # last, so that the output ends with the test summary

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
