"""How strongly the prompt is followed, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from physformer_core.errors import ConfigError
from physformer_core.flow.guidance import Guidance


def test_shapes_over_time() -> None:
    assert [Guidance(scale=5.0).at(t) for t in (0.0, 0.5, 1.0)] == [5.0, 5.0, 5.0]
    assert [Guidance(scale=5.0, shape="linear").at(t) for t in (0.0, 0.25, 1.0)] == [5.0, 4.0, 1.0]
    cosine = [Guidance(scale=5.0, shape="cosine").at(t) for t in (0.0, 0.5, 1.0)]
    assert cosine == pytest.approx([5.0, 3.0, 1.0])


def test_interval_and_levels() -> None:
    guidance = Guidance(scale=3.0, interval=(0.2, 0.8))
    assert [guidance.at(t) for t in (0.0, 0.19, 0.2, 0.8, 0.81, 1.0)] == [1, 1, 3, 3, 1, 1]
    assert Guidance(scale=3.0).at(0.5, level=1) == 1.0
    assert Guidance(scale=3.0, fine_levels=True).at(0.5, level=2) == 3.0


def test_combination() -> None:
    torch.manual_seed(0)
    conditional, unconditional = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    guided = Guidance().combine(conditional, unconditional, 4.0)
    assert torch.allclose(guided, unconditional + 4 * (conditional - unconditional), atol=1e-5)
    assert torch.allclose(Guidance().combine(conditional, unconditional, 1.0), conditional, atol=1e-6)
    assert torch.allclose(Guidance().combine(conditional, unconditional, 0.0), unconditional, atol=1e-6)


def test_rescale_brings_the_contrast_back_picture_by_picture() -> None:
    torch.manual_seed(0)
    conditional, unconditional = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    conditional[1] *= 7
    dims = (1, 2, 3)
    full = Guidance(rescale=1.0).combine(conditional, unconditional, 4.0)
    assert torch.allclose(full.std(dims), conditional.std(dims), rtol=1e-4)
    half = Guidance(rescale=0.5).combine(conditional, unconditional, 4.0)
    plain = Guidance().combine(conditional, unconditional, 4.0)
    assert torch.allclose(half, (plain + full) / 2, atol=1e-4)
    alone = Guidance(rescale=0.5).combine(conditional[1:], unconditional[1:], 4.0)
    assert torch.allclose(half[1:], alone, atol=1e-5)
    still = torch.zeros(1, 3, 4, 4)
    assert torch.isfinite(Guidance(rescale=1.0).combine(still, still, 4.0)).all()


def test_detail_is_carried_away_from_the_coarser_picture() -> None:
    torch.manual_seed(0)
    coarse, sample = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    for detail in (0.0, 0.5, 1.0, 1.1, 2.0):
        sharpened = Guidance(detail=detail).sharpen(sample, coarse)
        assert torch.allclose(sharpened, coarse + detail * (sample - coarse), atol=1e-6)
    assert Guidance(detail=1.0).sharpen(sample, coarse) is sample
    assert Guidance(detail=2.0).sharpen(sample, None) is sample, "level 0 has nothing to be carried away from"


@pytest.mark.parametrize(
    "wrong",
    [
        {"detail": -0.1}, {"detail": 2.1}, {"detail": float("nan")},
        {"scale": -1.0}, {"scale": float("nan")}, {"scale": float("inf")}, {"shape": "square"}, {"rescale": 1.5},
        {"interval": (0.8, 0.2)}, {"interval": (-0.1, 0.5)}, {"interval": (0.0, 1.1)},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Guidance(**wrong)
