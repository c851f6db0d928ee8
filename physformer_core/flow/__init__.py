"""How a field moves from noise to data: paths, guidance, solvers and the pyramid of levels. Knows no network."""

DEFAULT_GUIDANCE = 3.0
"""Guidance at level 0: compared by eye at 1, 2, 3 and 4 on the shipped checkpoint (docs/results.md)."""
