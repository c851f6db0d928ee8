"""Averaging over places of the patch grid: the field, its coarse field and its place move together."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.flow.shifted import SHIFTED_EVALUATIONS, predict_shifted

PLACE = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.125]])


def fields(height=24, width=16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    field, coarse = torch.randn(2, 2, 3, height, width, generator=generator)
    return field, coarse


def columns_and_rows(field: Tensor, coarse: Tensor, place: Tensor) -> Tensor:
    """Where each element lies in the picture, [B, 2, H, W], as the place says."""
    height, width = field.shape[-2:]
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    top, left, bottom, right = place[:, :, None, None].unbind(1)
    down = top + (bottom - top) * rows[None, :, None].expand(-1, -1, width)
    across = left + (right - left) * columns[None, None].expand(-1, height, -1)
    return torch.stack([down, across], dim=1)


@pytest.mark.parametrize("patch", [2, 3, 8])
def test_what_knows_no_grid_stays(patch):
    field, coarse = fields()
    for predict in (lambda z, c, p: z - 2 * c, columns_and_rows):
        found = predict_shifted(predict, field, coarse, PLACE, patch)
        torch.testing.assert_close(found, predict(field, coarse, PLACE))


def test_what_shows_the_grid_is_averaged():
    field, coarse = fields()

    def of_patches(z: Tensor, c: Tensor, place: Tensor) -> Tensor:
        assert z.shape == c.shape and z.shape[-2] % 8 == z.shape[-1] % 8 == 0
        return F.interpolate(F.avg_pool2d(z, 8), scale_factor=8)

    found = predict_shifted(of_patches, field, coarse, PLACE, 8)
    # The element at (9, 5) lies in these four patches.
    patches = [(8, 0), (4, 0), (8, 4), (4, 4)]
    means = [field[..., top : top + 8, left : left + 8].mean((-2, -1)) for top, left in patches]
    torch.testing.assert_close(found[..., 9, 5], sum(means) / 4)
    assert found.std() < of_patches(field, coarse, PLACE).std()


@pytest.mark.parametrize(("patch", "calls"), [(1, 1), (2, SHIFTED_EVALUATIONS), (8, SHIFTED_EVALUATIONS)])
def test_how_often_the_network_is_asked(patch, calls):
    shapes = []
    predict_shifted(lambda z, c, p: shapes.append(z.shape[-2:]) or z, *fields(), PLACE, patch)
    assert len(shapes) == calls and len(set(shapes)) == calls
    assert all(height % patch == width % patch == 0 for height, width in shapes)
