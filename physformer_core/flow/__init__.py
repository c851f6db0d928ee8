"""How a field moves from noise to data: paths, guidance, solvers and the pyramid of levels. Knows no network."""

DEFAULT_STEPS = (5, 1)
"""Steps at level 0 and at finer ones: with more, accuracy stays and the distance to real scenes hardly falls
(`physformer eval steps`, docs/results.md). A second step at a finer level, from halfway on, makes something of what the
network is not sure of, and pairs of things are recognised less often."""

DEFAULT_DETAIL = 1.05
"""Factor of the detail that finer levels add: with it the shipped checkpoint's edges have the power of real scenes' at
720p (docs/results.md). Much more is needed only by networks that were not trained on softened fields
(`TrainConfig.coarse_blur`), and brings halos."""

MAX_DETAIL = 2.0
"""Beyond it levels, which build on one another, only amplify their errors."""

DEFAULT_GUIDANCE = 1.5
"""Guidance at level 0: the shipped checkpoint's scores and pictures were compared at 1 to 4 (docs/results.md)."""
