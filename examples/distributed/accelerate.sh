#!/usr/bin/env bash
# The same with accelerate: accelerate.sh PROCESSES MODEL DATA OUTPUT [OPTION OF lora-da init]...
set -euo pipefail
processes=$1 model=$2 data=$3 output=$4
shift 4
exec accelerate launch --multi_gpu --num_machines 1 --num_processes "$processes" \
    --mixed_precision no --dynamo_backend no \
    --module lora_da_core.cli init --model "$model" --data "$data" --output "$output" "$@"
