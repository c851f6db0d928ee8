"""What the server of workers imports before it forks the first one, so that none of them has to."""

from physformer_core.chatter import hush

hush()

import physformer_core.benchmark.layers  # noqa: E402
import physformer_core.benchmark.networks  # noqa: E402
import physformer_core.benchmark.pictures  # noqa: E402, F401
