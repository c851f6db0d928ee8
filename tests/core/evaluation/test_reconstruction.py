"""PSNR and SSIM against formulae and known values; codecs in and out."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from physformer_core.codec import Codec, PixelCodec
from physformer_core.errors import DataError, SizeError
from physformer_core.evaluation.reconstruction import psnr, reconstruct, ssim


def test_psnr_of_a_known_error():
    a = torch.full((2, 3, 16, 16), 0.5)
    assert psnr(a, a + 0.1).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert math.isinf(psnr(a, a)[0])


def test_ssim_against_scipys_filter():
    random = np.random.default_rng(0)
    a = random.random((3, 40, 52))
    b = (a + 0.2 * random.standard_normal(a.shape)).clip(0, 1)

    def blur(plane):
        return scipy.ndimage.gaussian_filter(plane, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    values = []
    for x, y in zip(a, b, strict=True):
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        index = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        values.append(index.mean())
    assert float(ssim(torch.from_numpy(a)[None], torch.from_numpy(b)[None])) == pytest.approx(np.mean(values), abs=1e-6)
    with pytest.raises(SizeError, match="11 pixels"):
        ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))


class Halving(Codec):
    """Loses every second pixel."""

    name, channels, factor = "halving", 3, 2

    def encode(self, pictures):
        return pictures[:, :, ::2, ::2]

    def decode(self, field):
        return field.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def fingerprint(self):
        return "0" * 64


def test_codecs():
    pictures = list(np.random.default_rng(1).integers(0, 256, (3, 33, 21, 3), dtype=np.uint8))
    exact = reconstruct(pictures, PixelCodec())
    assert (exact.count, exact.psnr, exact.exact) == (3, None, 3) and exact.ssim == pytest.approx(1)
    told = []
    lossy = reconstruct(pictures, Halving(), on_picture=told.append)
    assert lossy.psnr is not None and 5 < lossy.psnr < 15 and lossy.ssim < 0.7 and told == [1, 2, 3]
    with pytest.raises(DataError, match="no pictures"):
        reconstruct([], PixelCodec())
