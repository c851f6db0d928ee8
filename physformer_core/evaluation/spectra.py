"""Edges and seams of pictures, read off the spectra of their gradients.

A picture that is blurred has less power than a real one in the finest octaves. A network that draws patch by patch may
leave seams between them. Steps at seams go up as often as down, and then the gradient's spectrum knows nothing of them;
that of its size does: a comb of peaks at the patch frequency and its multiples, which stand out from what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

OCTAVES = ((1 / 16, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1 / 2))
"""Bands in cycles per pixel, coarse to fine."""

_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)  # Rec. 709
_NEIGHBOURS = (3, 4, 5, 6)
"""Distances in bins of what a peak is compared with: beyond the two that the Hann window smears it over."""
_BETWEEN = 2 * _NEIGHBOURS[-1] + 2


class GradientSpectrum:
    """Mean power spectra of the luminance gradient and of its size, over pictures of one size, along rows and columns.

    Args:
        periods: Distances in pixels at which there may be seams: the sides of patches.
    """

    def __init__(self, periods: Sequence[int]) -> None:
        self.periods, self.count = tuple(periods), 0
        self._size: tuple[int, ...] = ()
        self._power: list[np.ndarray] = []
        self._combs: dict[int, list[np.ndarray]] = {}

    def add(self, picture: np.ndarray) -> None:
        """Takes in a picture, uint8 [height, width, 3].

        Raises:
            ValueError: It has another size than those before.
        """
        if self.count and picture.shape != self._size:
            raise ValueError("pictures of one spectrum must have one size")
        plane = picture.astype(np.float32) @ _LUMINANCE / 255
        gradients = [np.diff(plane, axis=1), np.diff(plane.T, axis=1)]
        powers = [_power(one, 2) for one in gradients]
        # For combs every picture weighs the same, whatever its contrast.
        energies = [max(float(np.square(one).sum()), 1e-12) for one in gradients]
        combs = {
            period: [_power(np.abs(one), period) / energy for one, energy in zip(gradients, energies, strict=True)]
            for period in self.periods
        }
        if self.count:
            powers = [a + b for a, b in zip(self._power, powers, strict=True)]
            combs = {
                period: [a + b for a, b in zip(self._combs[period], both, strict=True)]
                for period, both in combs.items()
            }
        self._power, self._combs = powers, combs
        self._size, self.count = picture.shape, self.count + 1

    def octaves(self) -> list[float]:
        """Mean power in each of `OCTAVES`, rows and columns together; there must be a picture."""
        shares = []
        for low, high in OCTAVES:
            parts = []
            for power in self._power:
                frequency = np.arange(len(power)) / (2 * (len(power) - 1))
                parts.append(power[(frequency >= low) & (frequency <= high)])
            values = np.concatenate(parts)  # none in a picture of a few pixels
            shares.append(float(values.mean()) / self.count if len(values) else 0.0)
        return shares

    def comb(self, period: int) -> float | None:
        """Power at a seam's frequency and its odd multiples over that of their neighbours: 1 where there are no seams.

        Seams twice as close leave nothing there. Seams twice as far apart do: of periods, the coarsest that is above 1
        is the one that has seams.

        Args:
            period: One of ``periods``.

        Returns:
            The mean over frequencies, rows and columns; None where the pictures are too small to tell.
        """
        ratios = []
        for power in self._combs[period]:
            step = 2 * (len(power) - 1) // period
            if step < _BETWEEN:
                continue
            for peak in range(step, len(power), 2 * step):
                near = [place for d in _NEIGHBOURS for place in (peak - d, peak + d) if 0 < place < len(power)]
                level = float(power[near].mean())
                if level > 0:
                    ratios.append(float(power[peak]) / level)
        return float(np.mean(ratios)) if ratios else None


def spectra_report(drawn: GradientSpectrum, real: GradientSpectrum) -> dict[str, Any]:
    """Drawn pictures beside real ones of the same prompts and size.

    Args:
        drawn, real: Their spectra.

    Returns:
        ``octaves``: for each band its limits in cycles per pixel and the power of drawn pictures as a share of real
        ones'. ``seams``: for each period that the pictures have room for, `GradientSpectrum.comb` of both.
    """
    octaves = [
        {"from": low, "to": high, "share": mine / theirs if theirs > 0 else None}
        for (low, high), mine, theirs in zip(OCTAVES, drawn.octaves(), real.octaves(), strict=True)
    ]
    seams = [
        {"period": period, "drawn": found, "real": real.comb(period)}
        for period in drawn.periods
        if (found := drawn.comb(period)) is not None
    ]
    return {"count": drawn.count, "octaves": octaves, "seams": seams}


def _power(gradient: np.ndarray, period: int) -> np.ndarray:
    """Power along the second axis, mean over the first: [n/2 + 1], with n even and a multiple of the period, so that
    the period's frequency is a bin."""
    unit = period if period % 2 == 0 else 2 * period
    length = gradient.shape[1] // unit * unit
    if length < 2 * unit:
        return np.zeros(2)
    gradient = gradient[:, :length] * np.hanning(length + 1)[:length].astype(np.float32)
    power: np.ndarray = np.square(np.abs(np.fft.rfft(gradient, axis=1))).mean(0) / length
    return power
