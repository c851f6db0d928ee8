"""How a field moves from noise to data: paths, guidance, solvers and the pyramid of levels. Knows no network."""
