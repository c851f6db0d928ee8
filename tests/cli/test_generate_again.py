"""`physformer generate --from`: a picture made again from what it tells of itself."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from physformer_core.metadata import read_metadata


@pytest.mark.parametrize(
    "arguments",
    [
        ("-n", "3", "--res", "150x130", "--steps", "3,2"),
        ("--negative-prompt", "a dog", "--guidance", "2.5", "--guidance-interval", "0.1,0.7", "--solver", "heun",
         "--res", "101x67", "--steps", "2", "--detail", "1.4"),
        ("--solver", "adaptive", "--res", "40x24", "--seed", "18446744073709551615"),
        ("--dtype", "bf16", "--res", "64x64", "--steps", "2", "--guidance", "1"),
    ],
)  # fmt: skip
def test_from_gives_the_same_bytes(generate, arguments):
    first = generate("a bird in a cage", *arguments, size=())
    assert first.code == 0, first.err
    again = generate("--from", str(first.files[-1]), "-o", "again.png", size=())
    assert again.code == 0 and [str(file) for file in again.files] == ["again.png"], again.err
    assert again.files[0].read_bytes() == first.files[-1].read_bytes()
    assert "warning" not in again.err


def test_from_a_batch_of_different_prompts(generate):
    Path("p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a red car on a street", "seed": 4}\n')
    first = generate("--prompt-file", "p.jsonl")
    again = generate("--from", str(first.files[1]), size=())
    assert again.files[0].read_bytes() == first.files[1].read_bytes()
    assert [str(file) for file in again.files] == ["outputs/a-red-car-on-a-street-4_1.png"]


def test_from_needs_the_same_checkpoint(generate, tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    first = generate("a cat", "-o", "cat.png")
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    ending = generate("--from", str(first.files[0]), size=(), checkpoint=other)
    assert ending.code == 1 and "was made by checkpoint tiny" in ending.err and "--checkpoint" in ending.err
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")  # the same weights elsewhere
    ending = generate("--from", str(first.files[0]), "-o", "again.png", size=(), checkpoint=moved)
    assert Path("again.png").read_bytes() == first.files[0].read_bytes()


def test_from_another_version_warns(generate, monkeypatch):
    generate("a cat", "-o", "cat.png")
    monkeypatch.setattr("physformer_core.project.package_versions", lambda: {"physformer": "9.9", "torch": "1.0"})
    ending = generate("--from", "cat.png", size=())
    assert ending.code == 0 and "made with physformer 0" in ending.err and "torch" in ending.err


@pytest.mark.usefixtures("without_native")
def test_without_kernels_in_c_it_says_why_it_is_slow(generate, monkeypatch):
    assert "do not run, so this takes up to twice as long: left out by a test" in " ".join(
        generate("a cat").err.split()
    )
    monkeypatch.setenv("PHYSFORMER_NATIVE", "0")
    assert "kernels" not in generate("a cat").err


def test_from_other_kernels_warns(generate, monkeypatch):
    generate("a cat", "-o", "cat.png")
    assert "kernels" not in generate("--from", "cat.png", size=()).err
    monkeypatch.setattr("physformer_core.drawing.kernels_of", lambda device, dtype: "magic")
    ending = generate("--from", "cat.png", size=())
    assert ending.code == 0 and "here they are in magic: the bytes may differ" in ending.err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"width": 0}, "cannot be followed"),
        ({"solver": "magic"}, "cannot be followed"),
        ({"solver": ""}, "cannot be followed"),
        ({"guidance": 10**400}, "cannot be followed"),
        ({"guidance": -1}, "cannot be followed"),
        ({"seed": -1}, "cannot be followed"),
        ({"seed": None}, "does not say enough"),
        ({"extra": {}}, "does not say enough"),
        ({"extra": {"steps_per_level": [10**9]}}, "cannot be followed"),
        ({"extra": {"steps_per_level": 3}}, "cannot be followed"),
        ({"extra": {"steps_per_level": [2], "detail": -1}}, "cannot be followed"),
        ({"extra": {"steps_per_level": [2], "batch": {"position": 5, "pictures": []}}}, "cannot be followed"),
        ({"extra": {"steps_per_level": [2], "batch": 7}}, "cannot be followed"),
        (
            {"extra": {"steps_per_level": [2], "batch": {"position": 0, "pictures": [{"seed": 0, "index": 0}] * 1025}}},
            "1025 pictures in one batch",
        ),
        ({"extra": {"steps_per_level": [2], "preview_of_level": 0}}, "is a preview of level 0"),
        ({"extra": {"steps_per_level": [2], "dtype": "fp7"}}, "unknown dtype"),
        ({"extra": {"steps_per_level": [2], "loras": [{"name": "a"}]}}, "its adapters are not named"),
        ({"extra": {"steps_per_level": [2], "loras": 3}}, "its adapters are not named"),
        ({"prompt": "a bird " * 40}, "tokens"),
    ],
)
def test_from_metadata_that_cannot_be_followed(generate, change, word):
    from physformer_core.metadata import PictureMetadata, save_png

    generate("a cat", "-o", "cat.png")
    told = read_metadata("cat.png")
    values = {key: value for key, value in told.as_dict().items() if key != "format"} | change
    save_png("bad.png", Image.new("RGB", (8, 8)), PictureMetadata(**values))
    ending = generate("--from", "bad.png", size=())
    assert ending.code == 1 and word in ending.err and ending.files == []


def test_from_what_is_no_picture_of_ours(generate):
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("text.png").write_text("text")
    for name, word in (("plain.png", "no generation metadata"), ("text.png", "not a PNG"), ("none.png", "cannot read")):
        ending = generate("--from", name, size=())
        assert ending.code == 1 and word in ending.err
