"""What other packages say at every start."""

import logging

from physformer_core.chatter import hush


def test_warnings_of_other_packages_are_left_out_and_errors_are_not(caplog, monkeypatch):
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.WARNING)
        monkeypatch.setattr(logger, "propagate", True)
        logger._cache.clear()
    hush()
    for logger in loggers:
        logger.warning("nothing to do with you")
        logger.error("broken")
    logging.getLogger("physformer_core").warning("ours")
    assert [record.getMessage() for record in caplog.records] == ["broken", "broken", "ours"]
