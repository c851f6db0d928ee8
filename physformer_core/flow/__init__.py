"""How a field moves from noise to data: paths, guidance, solvers and the pyramid of levels. Knows no network."""

DEFAULT_GUIDANCE = 1.5
"""Guidance at level 0: compared at 1, 1.5, 2, 3 and 4 on the shipped checkpoint, by scores and by eye (docs/results.md)."""
