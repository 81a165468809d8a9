#!/usr/bin/env bash
# Several machines of a SLURM cluster: sbatch slurm.sh MODEL DATA OUTPUT [OPTION OF lora-da init]...
#SBATCH --job-name=lora-da
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=01:00:00
set -euo pipefail
model=$1 data=$2 output=$3
shift 3
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One torchrun per machine; model, data and output lie on a disk that all machines see.
# --kill-on-bad-exit ends the other machines' processes when those of one have failed.
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m lora_da_core.cli init --model "$model" --data "$data" --output "$output" "$@"
