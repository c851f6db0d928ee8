import numpy as np
import pytest
from PIL import Image, ImageFilter

from physformer_core.data.scenes import compose_scene, render_svg
from physformer_core.evaluation.spectra import OCTAVES, GradientSpectrum, spectra_report


@pytest.fixture(scope="module")
def scenes():
    return [render_svg(compose_scene(3, number, aspect=1.0).svg, 256, 256) for number in range(24)]


def spectrum(pictures):
    found = GradientSpectrum((8, 16, 64))
    for picture in pictures:
        found.add(np.asarray(picture))
    return found


def seamed(picture, period, depth):
    """Every patch a little lighter or darker than the next."""
    tiles = np.random.default_rng(0).integers(-depth, depth + 1, (-(-256 // period), -(-256 // period)))
    lift = np.kron(tiles, np.ones((period, period)))[:256, :256, None]
    return np.clip(np.asarray(picture) + lift, 0, 255).astype(np.uint8)


def test_real_scenes_have_no_seams_and_seams_are_found(scenes):
    assert 0.75 < spectrum(scenes).comb(8) < 1.25
    shown = [spectrum([seamed(one, 8, depth) for one in scenes]).comb(8) for depth in (4, 12)]
    assert 1.2 < shown[0] < shown[1] and shown[1] > 1.5
    assert spectrum([seamed(one, 16, 12) for one in scenes]).comb(16) > 1.5
    assert 0.75 < spectrum([seamed(one, 8, 12) for one in scenes]).comb(16) < 1.25
    assert spectrum(scenes).comb(64) is None  # too few patches in a picture of 256 pixels


def test_seams_are_found_along_rows_and_along_columns(scenes):
    steps = np.kron(np.random.default_rng(1).integers(-12, 13, 32), np.ones(8))
    for lift in (steps[:, None, None], steps[None, :, None]):
        pictures = [np.clip(np.asarray(one) + lift, 0, 255).astype(np.uint8) for one in scenes]
        assert spectrum(pictures).comb(8) > 1.5


def test_blur_takes_from_the_finest_octave_most(scenes):
    blurred = [Image.fromarray(one).filter(ImageFilter.GaussianBlur(1)) for one in scenes]
    report = spectra_report(spectrum(blurred), spectrum(scenes))
    shares = [one["share"] for one in report["octaves"]]
    assert 1 > shares[0] > shares[1] > shares[2] and shares[2] < 0.1
    same = spectra_report(spectrum(scenes), spectrum(scenes))
    assert [one["share"] for one in same["octaves"]] == [1.0, 1.0, 1.0]
    assert [one["period"] for one in same["seams"]] == [8, 16] and same["count"] == len(scenes)


def test_white_noise_has_a_flat_gradient_but_for_its_rise():
    noise = np.random.default_rng(2).integers(0, 256, (12, 256, 256, 3), dtype=np.uint8)
    found = spectrum(noise)
    assert found.comb(8) == pytest.approx(1, abs=0.1)
    low, middle, high = found.octaves()
    coarse, fine = (np.mean(np.sin(np.pi * np.linspace(*band)) ** 2) for band in (OCTAVES[0], OCTAVES[2]))
    assert low < middle < high  # a difference has power 4 sin^2(pi f)
    assert high / low == pytest.approx(fine / coarse, rel=0.1)


def test_a_plain_or_tiny_picture_is_no_trouble_and_sizes_do_not_mix():
    plain = spectrum([np.full((256, 256, 3), 7, np.uint8)])
    assert plain.comb(8) is None and plain.octaves() == [0, 0, 0]
    assert spectra_report(plain, plain)["octaves"][0]["share"] is None
    tiny = spectrum([np.arange(192, dtype=np.uint8).reshape(8, 8, 3)])
    assert tiny.comb(8) is None and all(np.isfinite(tiny.octaves()))
    with pytest.raises(ValueError, match="one size"):
        plain.add(np.zeros((128, 128, 3), np.uint8))
