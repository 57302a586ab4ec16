"""How accurate and how fast batch norms are: for `python -m bnext` and for benchmarks/."""
