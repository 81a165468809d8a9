#!/usr/bin/env bash
# A sweep over a grid on the Ray cluster that RAY_ADDRESS names, or on this machine: ray_sweep.sh GRID MODEL DATA OUTPUT
set -euo pipefail
exec lora-da ablate "$1" --model "$2" --data "$3" --output "$4" --executor ray
