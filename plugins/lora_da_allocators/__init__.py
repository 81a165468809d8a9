"""Rank allocators: uniform, greedy, parameter_budget, sublora."""
