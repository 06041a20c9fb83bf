#!/usr/bin/env bash
# Train on the hosts of a hostfile with Open MPI's mpirun. The ranks find each other through mpi4py.
set -euo pipefail
# shellcheck source=launch/defaults.sh
source "$(dirname "${BASH_SOURCE[0]}")/defaults.sh"

read_command_line "bash launch/openmpi.sh [--hostfile FILE] --config R.yaml [section.key=value ...]" \
    "the slots in the hostfile" "$@"
read_hostfile
needs mpirun "Open MPI: apt-get install openmpi-bin"
needs python "the environment: bash launch/setup.sh mpi"
write_environment
preflight --hostfile "$hostfile" --environment "$environment_file"
exports=()
for variable in "${environment[@]}"; do exports+=(-x "$variable"); done
# MPI exchanges only a few bytes at launch, so TCP is sufficient. Probing other transports can hang.
run exec mpirun -n "$ranks" --hostfile "$hostfile" --bind-to none --mca pml ob1 --mca btl tcp,self \
    --mca plm_rsh_args "$HYPERMOE_SSH_OPTIONS" "${exports[@]}" python -u "$repo/pretrain/train.py" "${train[@]}"
