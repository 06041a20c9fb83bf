#!/usr/bin/env bash
# Run all GPU benchmarks on one GPU and write JSON files, profiles, traces and summary.md. A run takes about half an
# hour.
#
#   bash benchmarks/gpu_suite.sh      needs an environment with torch for CUDA, DeepSpeed and Transformers
#   OUT=DIR                            output folder (default: build/gpu_suite)
#   PYTHON=PATH                        the interpreter (default: python)
#   ONLY=REGEX                         run the steps whose names match (default: all), as in ONLY='HyperExperts|Losses'
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python}
out=${OUT:-build/gpu_suite}
only=${ONLY:-.}
deadline=2400 # seconds for the whole suite
if ! [[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]]; then
    echo "gpu_suite: this machine has no NVIDIA GPU; run the suite on a machine with a GPU" >&2
    exit 1
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_suite: torch of $python does not find the GPU; set PYTHON to an interpreter with torch for CUDA" >&2
    exit 1
fi
unset DS_ACCELERATOR
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True # avoid fragmentation between steps
mkdir -p "$out" || exit 1
summary=$out/summary.md
failed=()

# step NAME SECONDS COMMAND...: run a command and add its output to the summary; a failure does not end the suite.
step() {
    local name=$1 seconds=$2 started=$SECONDS status=0
    shift 2
    [[ $name =~ $only ]] || return 0
    local left=$((deadline - SECONDS))
    seconds=$((seconds < left ? seconds : left))
    echo "== $name"
    printf '\n## %s\n\n' "$name" >>"$summary"
    if ((seconds < 10)); then
        status=124
    else
        timeout --kill-after=5 "$seconds" "$@" >"$out/step.out" 2>"$out/step.err" || status=$?
        cat "$out/step.out" >>"$summary"
    fi
    if ((status)); then
        failed+=("$name")
        {
            printf '\nFAILED, exit code %s (124: out of time)\n\n```\n' "$status"
            tail -n 40 "$out/step.err" 2>/dev/null
            printf '```\n'
        } >>"$summary"
    fi
    echo "== $name: exit code $status, $((SECONDS - started)) s"
    rm -f "$out/step.out" "$out/step.err"
}

{
    printf '# GPU suite\n\n'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} >"$summary"

compare=("$python" benchmarks/train_step.py --ranks 1)
long=(--precision bf16 --sequence-length 4096 --warmup 3)
short=(--sides hypermoe --sequence-length 1024 --micro-batch-size 2 --steps 6 --warmup 0 --repeat-batch)

step "HyperExperts" 240 "$python" benchmarks/hyper_experts.py --device cuda --dtype bf16 --calibrate \
    --json "$out/hyper_experts.json"
step "Overlap of the HyperExperts" 120 "$python" benchmarks/overlap.py --json "$out/overlap.json" \
    --trace "$out/trace.json"
# Use the settings of the recipe: activation checkpointing and several micro-batches per step.
step "Training step, 3b-a0.4b" 600 "${compare[@]}" "${long[@]}" --preset 3b-a0.4b --steps 4 --warmup 1 --micro-batch-size auto \
    --accumulation 2 --activation-checkpointing --in-turns 1 \
    --json "$out/train_step_3b-a0.4b.json" --profile "$out/profile_3b-a0.4b.md"
step "Training step, gpt2-small-8e" 480 "${compare[@]}" "${long[@]}" --steps 20 --micro-batch-size auto \
    --json "$out/train_step_gpt2-small-8e.json" --profile "$out/profile_gpt2-small-8e.md"
step "Peers, gpt2-small-8e" 480 "${compare[@]}" "${long[@]}" --steps 10 --micro-batch-size 4 --in-turns 1 \
    --sides hypermoe,moe,mixtral,deepspeed_moe --json "$out/peers_gpt2-small-8e.json"
step "Losses, fp32" 150 "${compare[@]}" "${short[@]}" --precision fp32 --json "$out/losses_fp32.json"
step "Losses, bf16" 150 "${compare[@]}" "${short[@]}" --precision bf16 --json "$out/losses_bf16.json"
step "Losses, fp32 and bf16" 30 "$python" benchmarks/compare_losses.py "$out/losses_fp32.json" "$out/losses_bf16.json"

for profile in "$out"/profile_*.md; do
    if [ -f "$profile" ]; then
        { printf '\n## %s\n\n' "$(basename "$profile" .md)"; cat "$profile"; } >>"$summary"
    fi
done
echo "gpu_suite: $summary, $SECONDS s"
if ((${#failed[@]})); then
    printf 'gpu_suite: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
