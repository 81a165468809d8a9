"""Ablations: runs a grid of approximations, compares their cost, fidelity and fine-tunes, and reports."""

from lora_da_core.ablation.grid import Grid, make_grid, read_grid
from lora_da_core.ablation.runner import Plan, plan, run_grid

__all__ = ["Grid", "Plan", "make_grid", "plan", "read_grid", "run_grid"]
