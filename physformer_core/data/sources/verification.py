"""Is this example fit to be trained on? Pictures are decoded wholly, captions are read, and faults get a name.

What later stages read rightly is kept byte for byte: palette, grey, alpha, 16 bits, CMYK without a colour profile,
pictures that the camera turned (EXIF), and names with the wrong ending. What they would show in wrong colours is
stored as an RGB PNG instead. Everything that was not plain is counted.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageCms, UnidentifiedImageError

from physformer_core.data.framing import may_be_turned

MAX_PIXELS = 89_478_485
"""Pillow's own limit, a quarter of a gigabyte of RGB: above it a picture counts as a decompression bomb."""

# Only what people store pictures in: Pillow also opens documents (EPS through Ghostscript), fonts and scientific data.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_SUFFIXES = {
    "JPEG": "jpg jpeg jpe jfif",
    "MPO": "jpg jpeg jpe jfif mpo",
    "PNG": "png apng",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "DIB": "bmp dib",
    "TIFF": "tif tiff",
    "AVIF": "avif avifs",
    "JPEG2000": "jp2 j2k jpx",
    "PPM": "ppm pgm pnm pbm",
}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112

# Whatever bytes are no picture after all make a decoder say. A set of millions has all of these.
_DECODER_FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Refused(Exception):
    """An example that is not taken.

    Args:
        reason: One of few, under which it is counted.
        detail: What exactly, for the quarantine list.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class VerifiedPicture:
    """A picture that decodes.

    Args:
        image: The bytes to store: those given, or an RGB PNG in their place.
        width: In pixels, as it is to be looked at (upright).
        height: In pixels.
        notes: What is not plain about it.
    """

    image: bytes
    width: int
    height: int
    notes: tuple[str, ...]


def verify_picture(encoded: bytes | None, suffix: str = "") -> VerifiedPicture:
    """Decodes a picture and says what to store.

    Args:
        encoded: The file's content.
        suffix: What its name says it is; empty if it has no name.

    Raises:
        Refused: It is missing, empty, no picture, damaged, too large or an animation.
    """
    if encoded is None:
        raise Refused("no picture")
    if not encoded:
        raise Refused("empty picture file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is refused, or read rightly, here
        return _verify(encoded, suffix)


def verify_captions(captions: Sequence[str | bytes], *, alone: bool) -> tuple[list[str], tuple[str, ...]]:
    """The captions as text, and what is not plain about them.

    Args:
        captions: Text, or bytes in UTF-8. Text from files that were read with `surrogateescape` may hold what was
            not UTF-8.
        alone: Whether an example without any caption is fit for use (it has a class).

    Raises:
        Refused: One is not UTF-8, or there is none.
    """
    texts: list[str] = []
    empty = 0
    for caption in captions:
        try:
            text = caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption
            text.encode("utf-8")
        except UnicodeError as error:
            raise Refused("caption is not UTF-8", str(error)) from error
        text = text.replace("\0", " ").strip().removeprefix("\ufeff")
        if text:
            texts.append(text)
        else:
            empty += 1
    if not texts and not alone:
        raise Refused("empty caption" if empty else "no caption")
    return texts, ("some captions empty",) if empty and texts else ()


def _verify(encoded: bytes, suffix: str) -> VerifiedPicture:
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=_formats())
    except UnidentifiedImageError as error:
        if encoded.startswith(_SIGNATURES):
            raise Refused("damaged or cut short", "its header cannot be read") from error
        raise Refused("not a picture", f"begins with {encoded[:12]!r}") from error
    except Image.DecompressionBombError as error:
        raise Refused("too many pixels", str(error)) from error
    except _DECODER_FAULTS as error:
        raise Refused("damaged or cut short", _said(error)) from error
    if min(image.size) < 1:
        raise Refused("no pixels", f"{image.width}x{image.height}")
    if image.width * image.height > MAX_PIXELS:
        raise Refused("too many pixels", f"{image.width}x{image.height}")
    kind = image.format or ""
    try:
        frames = getattr(image, "n_frames", 1)
        # Phones append a depth map or a thumbnail (MPO): the first picture is the one that is meant.
        if frames > 1 and kind != "MPO":
            raise Refused("animated or of several pages", f"{frames} frames")
        image.load()
        orientation = int(image.getexif().get(_ORIENTATION, 1)) if may_be_turned(image) else 1
    except _DECODER_FAULTS as error:
        raise Refused("damaged or cut short", _said(error)) from error

    notes = [] if not suffix or suffix in _SUFFIXES[kind].split() else ["wrong extension"]
    width, height = image.size
    if 2 <= orientation <= 8:
        notes.append("turned by EXIF")
        if orientation >= 5:
            width, height = height, width
    notes += _mode_notes(image)
    replaced = _in_right_colours(image, notes)
    if replaced is not None:
        notes.append("stored as RGB PNG")
        encoded = _upright_png(replaced, image)
    return VerifiedPicture(encoded, width, height, tuple(notes))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _said(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _mode_notes(image: Image.Image) -> list[str]:
    notes = []
    if image.mode in ("P", "PA"):
        notes.append("palette")
    elif image.mode.startswith("I"):
        notes.append("16-bit")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        notes.append(image.mode)
    elif image.mode in ("1", "L", "LA"):
        notes.append("grey")
    if image.has_transparency_data:
        notes.append("alpha")
    return notes


def _in_right_colours(image: Image.Image, notes: list[str]) -> Image.Image | None:
    """The picture as RGB where a plain conversion would get its colours wrong, else None."""
    if image.mode == "F":
        raise Refused("pixels are not whole numbers")
    if image.mode == "I":  # 32 bits: what writes these means 16
        low, high = image.getextrema()
        if not 0 <= int(low) <= int(high) <= 0xFFFF:  # type: ignore[arg-type]
            raise Refused("more than 16 bits a pixel", f"values from {low} to {high}")
        return image.point([value >> 8 for value in range(0x10000)], "L").convert("RGB")
    profile = image.info.get("icc_profile")
    if image.mode not in ("CMYK", "LAB") or not profile:
        return None
    try:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append("unusable colour profile")
        return None
    return converted


def _upright_png(picture: Image.Image, original: Image.Image) -> bytes:
    """A PNG that is turned by the same EXIF entry as the original."""
    stream = io.BytesIO()
    exif = Image.Exif()
    if orientation := original.getexif().get(_ORIENTATION):
        exif[_ORIENTATION] = orientation
    picture.info.clear()
    picture.save(stream, "PNG", exif=exif if len(exif) else None)
    return stream.getvalue()
