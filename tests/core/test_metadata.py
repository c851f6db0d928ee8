"""Metadata in PNG files: back as written, and every kind of damaged or foreign file told apart."""

import json
import re
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from physformer_core.errors import DataError
from physformer_core.files import atomic_write
from physformer_core.metadata import FORMAT, PictureMetadata, read_metadata, read_text_chunks, save_png

FULL = PictureMetadata(
    prompt="a bird, in a cage\nat night: 🐦",
    seed=2**64 - 1,
    width=5,
    height=3,
    steps=8,
    guidance=3.5,
    solver="heun",
    negative_prompt="blurry, grey",
    image_index=2,
    checkpoint="nano, mine",
    checkpoint_sha256="ab" * 32,
    run="20260131-142503-k3f9q2",
    extra={"dtype": "float32", "levels": [1, 2]},
)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(path, *chunks: bytes):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b""))
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    with atomic_write(path) as temporary:
        save_png(temporary, Image.new("RGB", (5, 3)), FULL)
    return path


def test_back_as_written(picture):
    assert read_metadata(picture) == FULL
    assert Image.open(picture).size == (5, 3)


def test_same_values_same_bytes(tmp_path, picture):
    save_png(tmp_path / "b.png", Image.new("RGB", (5, 3)), FULL)
    assert (tmp_path / "b.png").read_bytes() == picture.read_bytes()


def test_parameters_in_the_form_of_a1111(picture):
    lines = read_text_chunks(picture)["parameters"].splitlines()
    assert lines[:3] == ["a bird, in a cage", "at night: 🐦", "Negative prompt: blurry, grey"]
    assert lines[3].startswith(
        f"Steps: 8, Sampler: heun, CFG scale: 3.5, Seed: {2**64 - 1}, Size: 5x3, Model hash: ababababab"
    )
    assert 'Model: "nano, mine"' in lines[3]


def test_parameters_of_another_program(tmp_path):
    text = (
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 12, Size: 512x768, "
        'Model: sd, Lora hashes: "x: 1, y: 2", Version: v1.9'
    )
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=chunks)
    found = read_metadata(tmp_path / "a.png")
    assert (found.prompt, found.negative_prompt, found.steps, found.solver) == ("a cat", "dog", 20, "Euler a")
    assert (found.guidance, found.seed, found.width, found.height, found.checkpoint) == (7.0, 12, 512, 768, "sd")
    assert found.version is None and found.extra == {"Lora hashes": "x: 1, y: 2", "Version": "v1.9"}


def test_compressed_chunks(tmp_path):
    chunks = PngInfo()
    chunks.add_text("parameters", "a cat", zip=True)
    chunks.add_itxt("physformer", FULL.to_json(), zip=True)
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=chunks)
    assert read_metadata(tmp_path / "a.png") == FULL


def test_every_truncation_is_told(tmp_path, picture):
    whole = picture.read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut short|is empty|not a PNG"):
            read_metadata(tmp_path / "cut.png")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_flipped_bit_is_told(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    save_png(folder / "a.png", Image.new("RGB", (5, 3)), FULL)
    content = bytearray((folder / "a.png").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "a.png").write_bytes(content)
    with pytest.raises(DataError):
        read_metadata(folder / "a.png")


def test_foreign_files(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(DataError, match="cannot read"):
        read_metadata(path)
    with pytest.raises(DataError, match="cannot read"):
        read_metadata(tmp_path)
    Image.new("RGB", (2, 2)).save(path, format="JPEG")
    with pytest.raises(DataError, match="not a PNG"):
        read_metadata(path)
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(DataError, match="no generation metadata") as caught:
        read_metadata(path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid"),
        ("[]", "not valid"),
        ('{"prompt": "a"}', "not valid"),
        ('{"format": "physformer-png/9", "prompt": "a"}', "physformer-png/9"),
        ("[" * 100_000, "not valid"),
        (json.dumps({"format": FORMAT}), "wrong prompt"),
        (json.dumps({"format": FORMAT, "prompt": "a", "seed": "x"}), "wrong seed"),
    ],
)
def test_damaged_json(tmp_path, text, words):
    path = png_with(tmp_path / "a.png", chunk(b"tEXt", b"physformer\0" + text.encode()))
    with pytest.raises(DataError, match=re.escape(words)):
        read_metadata(path)


def test_a_bomb_and_a_broken_text_chunk(tmp_path):
    bomb = zlib.compress(b"a" * (64 << 20))
    for data in (b"parameters\0\0" + bomb, b"parameters\0\0not zlib", b"no separator"):
        with pytest.raises(DataError, match="text chunk"):
            read_metadata(png_with(tmp_path / "a.png", chunk(b"zTXt", data)))


def test_an_undecodable_prompt_can_be_saved(tmp_path):
    save_png(tmp_path / "a.png", Image.new("L", (2, 2)), PictureMetadata(prompt="a \udcff"))
    assert read_metadata(tmp_path / "a.png").prompt == "a ?"
