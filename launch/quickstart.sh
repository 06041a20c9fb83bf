#!/usr/bin/env bash
# usage: bash launch/quickstart.sh [section.key=value ...]
#
# Set up the environment, train a small HyperMoE model on the text of Python's standard library, export the model and
# generate text. Two ranks share the experts.
#
#   section.key=value                                     overrides of pretrain/recipes/quickstart.yaml
#   QUICKSTART_DIR=DIR                                    output folder (default: quickstart)
#   QUICKSTART_EVERY=N                                    use only every N-th file (default: 1, all files)
set -euo pipefail

for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '/^set /q; 2,$s/^# \{0,1\}//p' "$0" && exit ;;
        -*) echo "quickstart.sh: $argument: is not an option; see --help" >&2 && exit 2 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
venv=${HYPERMOE_VENV:-$PWD/.venv}
PATH=$(cd "$venv/bin" && pwd):$PATH
export PATH
out=${QUICKSTART_DIR:-quickstart}
every=${QUICKSTART_EVERY:-1}
ranks=2
if [[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]]; then
    gpus=$(nvidia-smi -L | grep -c "GPU ")
    ranks=$((gpus < 2 ? gpus : 2))
else
    export DS_ACCELERATOR=cpu
    cores=$(nproc)
    export OMP_NUM_THREADS=$((cores < 2 * ranks ? 1 : cores / ranks)) # the ranks share the cores
fi

step() { printf '\n== %s\n' "$1"; }

# Use every 80th file for validation only, and all other files for training.
text_files() { # text_files train|valid
    python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))' |
        xargs -I{} find {} -name '*.py' -size +0 -not -path '*/site-packages/*' -not -path '*/test*/*' |
        LC_ALL=C sort | awk -v which="$1" -v every="$every" \
        '(NR - 1) % every == 0 { valid = (++n % 80 == 0); if (valid == (which == "valid")) print }'
}

step "text: Python's standard library, split by file"
mkdir -p "$out"
mapfile -t train < <(text_files train)
mapfile -t valid < <(text_files valid)
echo "${#train[@]} files for training, ${#valid[@]} for validation"

if [ ! -d "$out/tokenizer" ]; then
    step "tokenizer"
    python tools/train_tokenizer.py --input "${train[@]}" --vocab-size 4096 --output "$out/tokenizer"
fi
for split in train valid; do
    if [ ! -f "$out/data/$split.idx" ]; then
        step "data: $split"
        declare -n files=$split
        mkdir -p "$out/data"
        python tools/preprocess_data.py --input "${files[@]}" --tokenizer "$out/tokenizer" \
            --output "$out/data/$split" --workers "$(nproc)"
    fi
done

step "training on $ranks ranks"
deepspeed --log_level critical --num_gpus "$ranks" pretrain/train.py --config pretrain/recipes/quickstart.yaml \
    --deepspeed_config ds_configs/zero1.json run.dir="$out/run" data.tokenizer="$out/tokenizer" \
    "data.train=[{prefix: $out/data/train}]" "data.valid=[{prefix: $out/data/valid}]" \
    parallel.expert="$ranks" "$@"

step "export"
rm -rf "$out/hf"
python tools/convert_to_hf.py --checkpoint "$out/run" --output "$out/hf"

step "sample"
python tools/generate.py --checkpoint "$out/hf" --prompt "def read_lines(path):" --max-new-tokens 80

step "result"
python tools/summarize_run.py --checkpoint "$out/run"
