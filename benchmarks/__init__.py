"""Benchmarks of bnext; run them from the repository root, as ``python -m benchmarks.NAME``."""
