"""The arithmetic of growth."""

from __future__ import annotations

import pytest

from physformer_core.benchmark.fit import field_shape, fit_power_law, fit_quadratic_law
from physformer_core.errors import ConfigError


def test_fit_finds_the_exponent_of_an_exact_power_law() -> None:
    tokens = [1_000, 4_000, 16_000, 64_000]
    fit = fit_power_law(tokens, [3e-6 * n**1.25 for n in tokens])
    assert fit.exponent == pytest.approx(1.25)
    assert fit.factor == pytest.approx(3e-6)
    assert fit.half_width == pytest.approx(0, abs=1e-6)
    assert fit.at(128_000) == pytest.approx(3e-6 * 128_000**1.25)


def test_interval_covers_the_scatter() -> None:
    tokens = [1_000, 4_000, 16_000, 64_000]
    fit = fit_power_law(tokens, [n * factor for n, factor in zip(tokens, (1.0, 1.3, 0.8, 1.1), strict=True)])
    assert fit.half_width is not None and 0 < fit.half_width < 1
    assert abs(fit.exponent - 1) < fit.half_width


def test_two_sizes_have_no_interval_and_one_no_fit() -> None:
    assert fit_power_law([1, 2], [1, 2]).half_width is None
    for tokens in ([1], [2, 2]):
        with pytest.raises(ConfigError, match="two sizes"):
            fit_power_law(tokens, [1] * len(tokens))


def test_a_cost_of_nothing_has_no_power_law() -> None:
    with pytest.raises(ConfigError, match="cost of 0"):
        fit_power_law([1, 2], [0, 1])


@pytest.mark.parametrize("tokens", [64, 1_000, 14_400, 129_600])
def test_fields_have_the_size_and_aspect_asked_for(tokens: int) -> None:
    height, width = field_shape(tokens)
    assert height * width == pytest.approx(tokens, rel=0.05)
    assert width / height == pytest.approx(16 / 9, rel=0.2)


def test_a_quadratic_law_is_found_and_carries_on():
    tokens = [3600, 7200, 14400]
    law = fit_quadratic_law(tokens, [7e-5 * n + 5e-8 * n * n for n in tokens])
    assert law.linear == pytest.approx(7e-5) and law.square == pytest.approx(5e-8) and law.residual < 1e-9
    assert law.at(129600) == pytest.approx(7e-5 * 129600 + 5e-8 * 129600**2)
    # What grows slower than its tokens is not continued with a square that is negative.
    assert fit_quadratic_law([1, 10, 100], [1, 5, 20]).square == 0
    assert fit_quadratic_law([1000, 2000, 4000], [1.1, 3.8, 16.5]).residual > 0.01
    for wrong in ([1], [1, 1]):
        with pytest.raises(ConfigError):
            fit_quadratic_law(wrong, [1] * len(wrong))
