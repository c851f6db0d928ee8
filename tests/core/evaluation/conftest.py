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
