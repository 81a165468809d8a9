#!/usr/bin/env bash
# One machine, one process per GPU: torchrun.sh PROCESSES MODEL DATA OUTPUT [OPTION OF lora-da init]...
set -euo pipefail
processes=$1 model=$2 data=$3 output=$4
shift 4
exec torchrun --standalone --nproc-per-node "$processes" \
    -m lora_da_core.cli init --model "$model" --data "$data" --output "$output" "$@"
