"""What other packages say at every start and no user can act on."""

from __future__ import annotations

import logging

# Where torchao is installed, diffusers imports it, and both then tell of libraries for other machines.
_CHATTERERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def hush() -> None:
    """Lets these packages speak of errors alone; for a process that is ours, before it imports them."""
    for name in _CHATTERERS:
        logging.getLogger(name).setLevel(logging.ERROR)
