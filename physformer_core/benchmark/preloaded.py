"""What the server of workers imports before it forks the first one, so that none of them has to."""

import physformer_core.benchmark.layers
import physformer_core.benchmark.networks
import physformer_core.benchmark.pictures  # noqa: F401
