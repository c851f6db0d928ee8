"""SVG to pixels, whole or through a window: the window is rasterised on its own, not cut from a bitmap."""

from __future__ import annotations

import io
import re

import numpy as np

from physformer_core.errors import DataError

_ROOT = re.compile(r"<svg\b[^>]*>")
_VIEW_BOX = re.compile(r'\bviewBox="\s*([-\d.eE]+)[ ,]+([-\d.eE]+)[ ,]+([-\d.eE]+)[ ,]+([-\d.eE]+)\s*"')
_SIZE = re.compile(r'\s(?:width|height|viewBox|preserveAspectRatio)="[^"]*"')


def render_svg(
    svg: str,
    width: int,
    height: int,
    *,
    full_width: int | None = None,
    full_height: int | None = None,
    top: int = 0,
    left: int = 0,
) -> np.ndarray:
    """Renders a picture, or a window of it.

    Args:
        svg: A self-contained SVG document whose root has a ``viewBox``.
        width: Width of the window in pixels.
        height: Height of the window in pixels.
        full_width: Width of the whole picture in pixels; the window's width by default. The picture is stretched to
            the full size, so keep close to its own aspect ratio.
        full_height: Height of the whole picture in pixels; the window's height by default.
        top: First row of the window in the whole picture.
        left: First column of the window.

    Returns:
        RGB pixels, uint8 ``[height, width, 3]``, on white where the picture is transparent.

    Raises:
        DataError: If the SVG has no usable ``viewBox``, can't be rendered, or the window leaves the picture.
    """
    import resvg_py
    from PIL import Image

    full_width, full_height = full_width or width, full_height or height
    if width < 1 or height < 1 or top < 0 or left < 0 or top + height > full_height or left + width > full_width:
        raise DataError(
            f"window {height}x{width} at ({top}, {left}) does not lie in a picture of {full_height}x{full_width} pixels"
        )
    root = _ROOT.search(svg)
    box = _VIEW_BOX.search(root.group()) if root else None
    if root is None or box is None:
        raise DataError("the SVG has no root element with a viewBox")
    x, y, box_width, box_height = (float(part) for part in box.groups())
    scale_x, scale_y = box_width / full_width, box_height / full_height
    head = (
        f'<svg width="{width}" height="{height}" preserveAspectRatio="none" '
        f'viewBox="{x + left * scale_x:.9g} {y + top * scale_y:.9g} {width * scale_x:.9g} {height * scale_y:.9g}"'
        + _SIZE.sub("", root.group())[len("<svg") :]
    )
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg[: root.start()] + head + svg[root.end() :],
            background="#ffffff",
            skip_system_fonts=True,
            dpi=96,
        )
    except ValueError as error:
        raise DataError(f"the SVG can't be rendered: {error}") from error
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    if pixels.shape != (height, width, 3):
        raise DataError(f"the renderer gave {pixels.shape[:2]} pixels instead of {(height, width)}")
    return pixels
