"""How a field moves from noise to data: paths, guidance, solvers and the pyramid of levels. Knows no network."""

DEFAULT_GUIDANCE = 1.5
"""Guidance at level 0: the shipped checkpoint's scores and pictures were compared at 1 to 4 (docs/results.md)."""
