"""CLIP score beside transformers' own reckoning, and the captions that pictures bring."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from physformer_core.errors import CheckpointError, ConfigError, DataError
from physformer_core.evaluation.clip_score import ClipScorer
from physformer_core.evaluation.pictures import open_source
from physformer_core.metadata import PictureMetadata, save_png

CAPTIONS = ["a cat", "two dogs on a sofa", "b"]


def pictures(count=3, side=28):
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_scores_are_those_of_transformers(tiny_clip):
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(tiny_clip).eval(), AutoTokenizer.from_pretrained(tiny_clip)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    for caption, picture, found in zip(
        CAPTIONS, pictures(), ClipScorer(str(tiny_clip)).scores(pictures(), CAPTIONS), strict=True
    ):
        pixels = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
        tokens = tokenizer([caption], truncation=True, max_length=8, return_tensors="pt")  # alone: nothing is padded
        with torch.inference_mode():
            output = model(**tokens, pixel_values=pixels[None])
            cosine = float(output.logits_per_image[0, 0] / model.logit_scale.exp())
        assert found == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)


def test_pictures_are_passed_on_and_counted(tiny_clip):
    scorer = ClipScorer(str(tiny_clip), batch_size=2)
    with pytest.raises(DataError, match="no pictures"):
        scorer.result()
    seen = list(scorer.watch(zip(pictures(side=40), CAPTIONS, strict=True)))
    assert [picture.tobytes() for picture in seen] == [picture.tobytes() for picture in pictures(side=40)]
    score = scorer.result()
    alone = scorer.scores(pictures(side=40), CAPTIONS)
    assert score.mean == pytest.approx(alone.mean(), abs=1e-4)
    assert score.standard_error == pytest.approx(alone.std(ddof=1) / 3**0.5, abs=1e-4)
    assert score.recipe["count"] == 3 and score.recipe["captions_cut_off"] == 1 and score.recipe["input"] == "28x28"
    other = ClipScorer(str(tiny_clip))
    list(other.watch(zip(pictures(side=40), reversed(CAPTIONS), strict=True)))
    assert other.result().recipe["captions_sha256"] != score.recipe["captions_sha256"]
    assert other.fingerprint == scorer.fingerprint


def test_models_that_are_none(tiny_clip, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_clip, bare, ignore=lambda _, names: [name for name in names if name.startswith("token")])
    with pytest.raises(CheckpointError, match="no tokenizer"):
        ClipScorer(str(bare))
    (bare / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights in safetensors"):
        ClipScorer(str(bare))
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ConfigError, match="of kind 'dinov2', not clip"):
        ClipScorer(str(tmp_path / "dinov2"))


def test_captions_of_files(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text(" a cat \n")
    made = PictureMetadata(
        prompt="a bird in a cage", seed=7, width=8, height=8, steps=1, guidance=3.0, checkpoint_sha256="0" * 64
    )
    save_png(tmp_path / "b.png", Image.new("RGB", (8, 8)), made)
    found = [caption for _, caption in open_source(tmp_path).captioned()]
    assert found == ["a cat", "a bird in a cage"]
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(DataError, match=r"c\.png has no caption"):
        open_source(tmp_path).captioned()


def test_captions_of_sets(scene_raw, scene_set):
    for folder in (scene_raw, scene_set):
        source = open_source(folder, size=32)
        pairs = list(source.captioned())
        assert len(pairs) == source.count == 60 and all(caption for _, caption in pairs)
        np.testing.assert_array_equal(pairs[0][0], next(iter(source)))
        assert pairs[0][1] == source.captions(60)[0].caption
