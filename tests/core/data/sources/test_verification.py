"""Every fault of a picture or a caption is found and named; what is merely unusual is kept, and decodes rightly."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from physformer_core.data.framing import UnusablePicture, open_bitmap
from physformer_core.data.sources.verification import Refused, verify_captions, verify_picture

Make = Callable[..., bytes]


def png(width: int, height: int, *, extra: bytes = b"") -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_plain_picture_is_kept_as_it_is(make_picture: Make, kind: str) -> None:
    encoded = make_picture(1, kind)
    found = verify_picture(encoded, kind.lower())
    assert found.image is encoded and (found.width, found.height) == (40, 30)
    assert found.notes == (("palette",) if kind == "GIF" else ())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_is_cut_short_is_refused(make_picture: Make, kind: str) -> None:
    encoded = make_picture(1, kind, size=(80, 60))
    for kept in (len(encoded) // 2, 20):
        with pytest.raises(Refused) as refused:
            verify_picture(encoded[:kept], kind.lower())
        assert refused.value.reason == "damaged or cut short", kept


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (None, "no picture"),
        (b"", "empty picture file"),
        (b"<html>404</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (png(0, 4), "damaged or cut short"),
        (png(12000, 12000), "too many pixels"),
        (png(60000, 60000), "too many pixels"),
        (animated("GIF"), "animated or of several pages"),
        (animated("PNG"), "animated or of several pages"),
        (animated("WEBP"), "animated or of several pages"),
        (animated("TIFF"), "animated or of several pages"),
        (saved(Image.new("F", (9, 9), 0.5), "TIFF"), "pixels are not whole numbers"),
        (saved(Image.new("I", (9, 9), 1 << 20), "TIFF"), "more than 16 bits a pixel"),
    ],
)
def test_what_is_no_use_is_refused(encoded: bytes | None, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        verify_picture(encoded)
    assert refused.value.reason == reason


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused() -> None:
    text = b"Comment\0\0" + zlib.compress(b"\0" * (80 << 20))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(Refused) as refused:
        verify_picture(png(8, 8, extra=chunk))
    assert refused.value.reason == "damaged or cut short"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_unusual_modes_are_kept_and_read_rightly(mode: str) -> None:
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(ramp).convert(mode)
    encoded = saved(image, "TIFF" if mode == "CMYK" else "PNG")
    found = verify_picture(encoded)
    assert found.image is encoded
    named = {"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "RGBA": "alpha", "I;16": "16-bit"}
    assert named.get(mode, mode) in found.notes
    expected = Image.fromarray(ramp).convert("1" if mode == "1" else "RGB").convert("RGB")
    difference = np.asarray(open_bitmap(found.image)).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 2


def test_wide_integers_are_stored_as_they_look() -> None:
    ramp = np.linspace(0, 0xFFFF, 64).reshape(8, 8).astype(np.int32)
    found = verify_picture(saved(Image.fromarray(ramp), "TIFF"))
    assert "stored as RGB PNG" in found.notes
    assert np.array_equal(np.asarray(open_bitmap(found.image))[..., 1], ramp >> 8)
    # As they are, where nothing has verified them: a folder that is evaluated.
    assert np.array_equal(np.asarray(open_bitmap(saved(Image.fromarray(ramp), "TIFF")))[..., 1], ramp >> 8)
    for other in (ramp + 1, (ramp / 0xFFFF).astype(np.float32)):
        with pytest.raises(UnusablePicture, match=r"more than 16 bits|not whole numbers"):
            open_bitmap(saved(Image.fromarray(other), "TIFF"))


def test_cmyk_with_a_profile_is_stored_in_its_colours() -> None:
    # An RGB profile does not fit CMYK and is said to be unusable; a LAB picture with its own profile is converted.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    encoded = saved(Image.new("CMYK", (9, 9), (0, 200, 200, 0)), "JPEG", icc_profile=srgb)
    found = verify_picture(encoded, "jpg")
    assert found.image is encoded and found.notes == ("CMYK", "unusable colour profile")
    red = ImageCms.profileToProfile(
        Image.new("RGB", (9, 9), (200, 30, 40)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )  # fmt: skip
    found = verify_picture(saved(red, "TIFF", icc_profile=lab), "tif")
    assert found.notes == ("LAB", "stored as RGB PNG")
    assert np.abs(np.array(open_bitmap(found.image).getpixel((4, 4))) - (200, 30, 40)).max() <= 3


def test_turned_pictures_have_their_upright_size(make_picture: Make) -> None:
    for orientation, size in ((1, (40, 30)), (3, (40, 30)), (6, (30, 40)), (8, (30, 40))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = verify_picture(make_picture(2, "JPEG", exif=exif), "jpg")
        assert (found.width, found.height) == size == open_bitmap(found.image).size
        assert found.notes == (("turned by EXIF",) if orientation > 1 else ())


def test_a_wrong_ending_is_noted_and_harmless(make_picture: Make) -> None:
    encoded = make_picture(3, "PNG")
    assert verify_picture(encoded, "jpg").notes == ("wrong extension",)
    assert verify_picture(encoded, "").notes == ()


def test_a_phone_picture_with_a_second_frame_is_its_first() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green")]
    encoded = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert verify_picture(encoded, "jpg").image is encoded
    assert open_bitmap(encoded).getpixel((9, 9))[0] > 200


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_is_refused_or_read_like_later(make_picture: Make) -> None:
    """What verification lets through, preprocessing opens."""
    base = make_picture(4, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(base)
        for place in rng.integers(0, 80, 4):
            broken[place] = rng.integers(0, 256)
        try:
            found = verify_picture(bytes(broken))
        except Refused:
            continue
        assert open_bitmap(found.image).size == (found.width, found.height)


def test_captions() -> None:
    assert verify_captions([b"\xef\xbb\xbf a bird ", "a cat"], alone=False) == (["a bird", "a cat"], ())
    assert verify_captions(["", "a cat"], alone=False) == (["a cat"], ("some captions empty",))
    assert verify_captions([], alone=True) == ([], ())
    for captions, reason in (
        ([b"caf\xe9"], "caption is not UTF-8"),
        (["caf\udce9"], "caption is not UTF-8"),
        ([b" \n"], "empty caption"),
        (["\0"], "empty caption"),
        ([], "no caption"),
    ):
        with pytest.raises(Refused) as refused:
            verify_captions(captions, alone=False)
        assert refused.value.reason == reason
