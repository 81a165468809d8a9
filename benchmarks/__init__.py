"""Benchmarks as commands: `python -m benchmarks.<name>` prints a table and writes JSON."""
