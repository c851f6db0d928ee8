"""Settling: the mean of predictions under several noises, all from one moment of the path."""

import pytest
import torch

from physformer_core.flow.path import FlowPath
from physformer_core.flow.settling import SETTLING_TIME, settled

FIELD, *NOISES = torch.randn(4, 2, 3, 8, 12, generator=torch.Generator().manual_seed(5))


def test_what_is_seen_under_every_noise_stays():
    found = settled(lambda z, t: FIELD, FIELD, NOISES, FlowPath())
    torch.testing.assert_close(found, FIELD)


def test_what_is_of_the_noise_is_averaged():
    found = settled(lambda z, t: z, FIELD, NOISES, FlowPath())
    wanted = SETTLING_TIME * FIELD + (1 - SETTLING_TIME) * sum(NOISES) / 3
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic", "vp"])
def test_predictions_are_asked_for_where_they_were_trained(name):
    path, asked = FlowPath(name=name), []
    settled(lambda z, t: asked.append((z, t)) or z, FIELD, NOISES, path)
    assert [t for _, t in asked] == [SETTLING_TIME] * 3
    for (z, t), noise in zip(asked, NOISES, strict=True):
        torch.testing.assert_close(z, path.interpolate(noise, FIELD, torch.full((2,), t)))
