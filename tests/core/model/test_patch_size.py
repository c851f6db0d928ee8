"""Resized patches: lower frequencies are read and written as before, and white noise stays white."""

import pytest
import torch

from physformer_core.model.network import PhysFormerFinalLayer, PhysFormerPatchEmbed
from physformer_core.model.patch_size import cosines, resampling, resized_reading, resized_writing

SIZES = [(4, 6), (4, 8), (6, 4), (2, 3), (5, 5)]


@pytest.mark.parametrize("size", [1, 4, 6])
def test_cosines_are_orthonormal(size: int) -> None:
    assert torch.allclose(cosines(size) @ cosines(size).T, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_a_constant_stays_that_constant(old: int, new: int) -> None:
    assert torch.allclose(resampling(old, new).sum(1), torch.ones(old, dtype=torch.float64))


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_what_a_larger_patch_is_given_comes_back(old: int, new: int) -> None:
    small, large = sorted((old, new))
    there_and_back = resampling(small, large) @ resampling(large, small)
    assert torch.allclose(there_and_back, torch.eye(small, dtype=torch.float64), atol=1e-12)


def test_white_noise_stays_white_and_is_weaker() -> None:
    reading = resampling(4, 6)
    assert torch.allclose(reading @ reading.T, 4 / 6 * torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_the_order_of_elements_in_a_patch_is_kept() -> None:
    """A slope to the right stays one to the right, of one channel of two, through both layers as they are used."""
    embed = PhysFormerPatchEmbed(2, 4, 8, 5)
    large = PhysFormerPatchEmbed(2, 6, 8, 5)
    weights = embed.state_dict()
    large.load_state_dict(weights | {"proj1.weight": resized_reading(weights["proj1.weight"], 4, 6)})
    across = resampling(6, 4).float()
    fields = torch.randn(2, 3, 2, 8, 12)  # noisy and coarse
    wide = across @ fields.unflatten(4, (-1, 4)).unflatten(3, (-1, 4)).permute(0, 1, 2, 3, 5, 4, 6) @ across.T
    wide = wide.permute(0, 1, 2, 3, 5, 4, 6).flatten(5, 6).flatten(3, 4)
    assert wide.shape == (2, 3, 2, 12, 18)
    place = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(3, 4)
    assert torch.allclose(embed(*fields, place), large(*wide, place), atol=1e-5)

    final, larger = PhysFormerFinalLayer(8, 4, 2), PhysFormerFinalLayer(8, 6, 2)
    weights = final.state_dict()
    resized = {f"proj_out.{kind}": resized_writing(weights[f"proj_out.{kind}"], 4, 6) for kind in ("weight", "bias")}
    larger.load_state_dict(weights | resized)
    tokens, temb = torch.randn(3, 2, 3, 8), torch.randn(3, 8)
    written = final(tokens, temb).unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 1, 2, 4, 3, 5)
    expected = (across @ written @ across.T).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    assert torch.allclose(larger(tokens, temb), expected, atol=1e-5)
