"""A feature network that needs no weights: what it sees, made very small."""

import hashlib

import pytest
import torch

from physformer_core.evaluation.features import FeatureExtractor


class TinyExtractor(FeatureExtractor):
    """The picture at 8 x 8, less its mean."""

    def __init__(self) -> None:
        self.name, self.model, self.side, self.width = "tiny", "tiny", 32, 192
        self.fingerprint = hashlib.sha256(b"tiny").hexdigest()
        self.device = torch.device("cpu")

    def _run(self, pixels_bchw):
        small = torch.nn.functional.adaptive_avg_pool2d(pixels_bchw / 255, 8).flatten(1)
        return small - small.mean(1, keepdim=True)


@pytest.fixture(scope="session")
def tiny_extractor():
    return TinyExtractor()


@pytest.fixture
def few_views(monkeypatch):
    """A classifier that is fitted to a view of each kind, small: seconds instead of minutes."""
    from physformer_core.evaluation import classifier

    monkeypatch.setattr(classifier, "VIEWS", ("single", "setting", "caged", "pair"))
    monkeypatch.setattr(classifier, "SIDES", (32, 48))
    monkeypatch.setattr(classifier, "_MAX_STEPS", 40)
