"""`physformer eval`: a tiny network, few pictures, and a feature network that needs no weights."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import physformer_core.evaluation.classifier as classifier
import physformer_core.evaluation.features as features
from physformer_cli import console, main
from physformer_core.checkpoints import find_checkpoint
from physformer_core.flow import DEFAULT_GUIDANCE
from physformer_core.project import Project


class TinyExtractor(features.FeatureExtractor):
    """The picture at 4 x 4."""

    def __init__(self) -> None:
        self.name, self.model, self.side, self.width = "tiny", "tiny", 16, 48
        self.fingerprint = hashlib.sha256(b"tiny-4").hexdigest()
        self.device = torch.device("cpu")

    def _run(self, pixels_bchw):
        return torch.nn.functional.adaptive_avg_pool2d(pixels_bchw / 255 - 0.5, 4).flatten(1)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, tmp_path_factory, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("PHYSFORMER_PROJECT", raising=False)
    monkeypatch.delenv("PHYSFORMER_DEBUG", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "eval-cache"))
    console.stderr.cache_clear()  # pytest has replaced sys.stderr since
    yield
    console.stderr.cache_clear()


@pytest.fixture
def tiny_features(monkeypatch):
    """And a judge that is fitted to two small views of each concept, in seconds instead of minutes."""
    monkeypatch.setattr(features, "load_extractor", lambda *_: TinyExtractor())
    monkeypatch.setattr(classifier, "VIEWS", ("single", "caged"))
    monkeypatch.setattr(classifier, "SIDES", (32,))
    monkeypatch.setattr(classifier, "_MAX_STEPS", 40)


@pytest.fixture
def physformer(monkeypatch, capfd):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        capfd.readouterr()
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["physformer", *arguments])
        code = main.main(arguments)
        out, err = capfd.readouterr()
        assert "Traceback" not in err and "unexpected" not in err, err
        return code, out, err

    return call


@pytest.fixture
def folders():
    random = np.random.default_rng(0)
    for name, low in (("real", 0), ("made", 120)):
        os.mkdir(name)
        for number in range(6):
            Image.fromarray(random.integers(low, 256, (24, 32, 3), dtype=np.uint8)).save(f"{name}/{number}.png")
    return "real", "made"


def test_fid_of_two_folders_with_its_recipe(physformer, tiny_features, folders):
    code, out, err = physformer("eval", "fid", *("real", "--generated", "made"), "--json", "-o", "score.json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["name"] != "FID" and shown["frechet"] > 0 and shown["kid"] is not None and 0 <= shown["precision"] <= 1
    recipe = shown["recipe"]
    assert recipe["extractor"]["sha256"] == TinyExtractor().fingerprint and recipe["extractor"]["resize"]
    assert recipe["reference"]["count"] == 6 and len(recipe["generated"]["pictures"]["sha256"]) == 64
    assert err.count("warning:") == 2 and "fewer than 10,000" in err
    assert json.loads(Path("score.json").read_text()) == shown
    run = Project.load("physformer.toml").runs[-1]
    assert run.command == "eval fid" and run.config["frechet"] == pytest.approx(shown["frechet"])
    assert run.config["recipe"]["extractor"]["name"] == "tiny" and run.outputs[0].path == "score.json"
    before = Path("score.json").read_bytes()
    assert physformer("eval", "fid", "real", "--generated", "made", "-o", "score.json")[0] == 0
    assert Path("score.json").read_bytes() == before == Path("score_1.json").read_bytes()  # nothing is overwritten
    code, out, _ = physformer("eval", "fid", "real", "--generated", "made", "--no-record")
    assert code == 0 and "not FID" in out and "precision" in out


def test_fid_of_a_statistics_file(physformer, tiny_features, folders):
    code, _, err = physformer("eval", "fid", "real", "--save-statistics", "real.npz")
    assert code == 0 and "statistics of 6 pictures" in err
    with np.load("real.npz") as archive:
        assert archive["mu"].shape == (48,) and archive["sigma"].shape == (48, 48)
    direct = json.loads(physformer("eval", "fid", "real", "--generated", "made", "--json")[1])
    code, out, _ = physformer("eval", "fid", "real.npz", "--generated", "made", "--json")
    through = json.loads(out)
    assert code == 0 and through["frechet"] == pytest.approx(direct["frechet"]) and through["kid"] is None
    code, _, err = physformer("eval", "fid", "real.npz", "--generated", "made", "--max-distance", "0.001")
    assert code == 3 and "is more than 0.001" in err and Project.load("physformer.toml").runs[-1].status == "failed"
    code, _, err = physformer("eval", "fid", "real.npz", "--generated", "made", "--features", "efficientnet")
    assert code == 0  # the stand-in answers to every name


def test_fid_of_drawn_pictures(physformer, tiny_features, tiny_checkpoint, scene_raw, scene_set):
    code, out, err = physformer(
        "eval", "fid", scene_set, "--checkpoint", tiny_checkpoint, "--num", 4, "--steps", 1, "--json", "--no-record"
    )
    assert code == 0, err
    made = json.loads(out)["recipe"]["generated"]["pictures"]
    assert made["kind"] == "checkpoint" and made["sha256"] == find_checkpoint(tiny_checkpoint).sha256
    assert made["count"] == 4 and made["guidance"] == DEFAULT_GUIDANCE and made["steps"] == [1] and made["seeds"] == [0]
    code, out, err = physformer(
        "eval", "fid", scene_raw, "--checkpoint", tiny_checkpoint, "--num", 2, "--steps", 1, "--size", 32, "--json"
    )
    assert code == 0 and json.loads(out)["recipe"]["reference"]["pictures"]["size"] == 32, err


def test_fid_with_prompts_of_a_file(physformer, tiny_features, tiny_checkpoint, folders):
    Path("p.txt").write_text("a cat\na dog\n")
    code, out, err = physformer(
        "eval", "fid", "real", "--checkpoint", tiny_checkpoint, "--num", 3, "--prompts", "p.txt", "--size", 32,
        "--steps", 1, "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["recipe"]["generated"]["pictures"]["sizes"] == ["32x32"], err
    code, _, err = physformer("eval", "fid", "real", "--checkpoint", tiny_checkpoint, "--num", 3)
    assert code == 1 and "no captions" in err and "--prompts" in err
    drawn = ("--checkpoint", tiny_checkpoint, "--num", 3, "--size", 32, "--steps", 1)
    Path("long.txt").write_text("a cat\n" + "a dog " * 40 + "\n")
    code, _, err = physformer("eval", "fid", "real", *drawn, "--prompts", "long.txt")
    assert code == 1 and "a prompt has 82 tokens, the model takes 32" in err and "reference" not in err
    Path("p.jsonl").write_text('{"prompt": "a cat", "width": 64}\n')
    code, _, err = physformer("eval", "fid", "real", *drawn, "--prompts", "p.jsonl")
    assert code == 1 and "p.jsonl, line 1: width has no effect here" in err


def test_clip_score_of_captioned_pictures(physformer, tiny_features, folders, tiny_clip, tiny_checkpoint):
    for number in range(6):
        Path(f"made/{number}.txt").write_text(f"a cat {number}")
    arguments = ("eval", "fid", "real", "--clip-score", tiny_clip, "--json", "--no-record")
    code, out, err = physformer(*arguments, "--generated", "made")
    shown = json.loads(out)
    assert code == 0 and 0 <= shown["clip"] <= 100 and shown["clip_error"] is not None, err
    recipe = shown["recipe"]["clip_score"]
    assert recipe["count"] == 6 and len(recipe["sha256"]) == len(recipe["captions_sha256"]) == 64
    code, out, _ = physformer("eval", "fid", "real", "--clip-score", tiny_clip, "--generated", "made", "--no-record")
    assert code == 0 and "CLIP score" in out
    Path("p.txt").write_text("a cat\na dog\n")
    drawn = ("--checkpoint", tiny_checkpoint, "--num", 3, "--prompts", "p.txt", "--size", 32, "--steps", 1)
    code, out, err = physformer(*arguments, *drawn)
    assert code == 0 and json.loads(out)["recipe"]["clip_score"]["count"] == 3, err
    Path("made/3.txt").unlink()
    code, out, err = physformer(*arguments, "--generated", "made")
    assert code == 1 and "3.png has no caption" in err and out == ""
    code, _, err = physformer(*arguments, "--save-statistics", "x.npz")
    assert code == 1 and "--clip-score has no effect" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("none", "--generated", "made"), "there is no folder none"),
        (("real", "--generated", "none"), "there is no folder none"),
        (("real", "--generated", "made", "--num", "3"), "--num has no effect"),
        (("real", "--generated", "made", "--steps", "3"), "--steps has no effect"),
        (("real", "--generated", "made", "--guidance", "3"), "--guidance has no effect"),
        (("real", "--save-statistics", "x.npz", "--dtype", "fp32"), "--dtype has no effect"),
        (("real", "--save-statistics", "real/0.png/x.npz"), "cannot write real/0.png"),
        (("real", "--save-statistics", "x"), "statistics are a file .npz, not 'x'"),
        (("real", "--generated", "made", "--split", "train"), "--split has no effect"),
        (("real", "--generated", "made", "--split", "test"), "unknown split"),
        (("real", "--generated", "made", "--size", "64"), "--size has no effect"),
        (("real.npz", "--generated", "made"), "holds no feature statistics"),
        (("real.npz", "--generated", "made", "--save-statistics", "x.npz"), "--save-statistics has no effect"),
    ],
)
def test_fid_mistakes(physformer, tiny_features, folders, arguments, word):
    code, out, err = physformer("eval", "fid", *arguments)
    assert code == 1 and word in err and out == "", err


def test_features_that_are_not_there(physformer, folders, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "nothing").as_uri())
    code, _, err = physformer("eval", "fid", "real", "--generated", "made", "--features", "inception")
    assert code == 1 and "--feature-model inception-2015-12-05.pt" in err
    code, _, err = physformer("eval", "fid", "real", "--generated", "made", "--features", "vgg")
    assert code == 1 and "unknown features" in err


def test_prompts(physformer, tiny_features, tiny_checkpoint):
    arguments = ("eval", "prompts", "--checkpoint", tiny_checkpoint, "--num", 4, "--relations", 7, "--phrased", 3,
                 "--size", 32, "--steps", 1)  # fmt: skip
    code, _, err = physformer(*arguments, "--contact-sheet", "sheet.jpg")
    assert code == 1 and "--contact-sheet is a PNG file, not 'sheet.jpg'" in err
    Path("taken").write_text("no folder")
    code, _, err = physformer(*arguments, "-o", "taken/prompts.json")
    assert code == 1 and "cannot write taken" in err and "judge" not in err, err
    code, out, err = physformer(*arguments, "--json", "--contact-sheet", "sheet.png", "-o", "prompts.json")
    assert code == 0, err
    shown = json.loads(out)
    single, pairs = shown["single"], shown["relations"]
    assert single["count"] == 4 and pairs["count"] == 7 and shown["phrased"]["count"] == 3
    assert len(shown["pictures"]) == 14 and shown["spectra"]["count"] == 14
    assert all(one["share"] > 0 for one in shown["spectra"]["octaves"])
    for one in (single, pairs, shown["phrased"]):
        assert 0 <= one["top1"]["low"] <= one["top1"]["value"] <= one["top5"]["value"] <= 1
        assert one["ceiling"]["top5"] >= one["ceiling"]["top1"] and one["floor"]["top5"] is not None
    assert shown["recipe"]["generated"]["sha256"] == find_checkpoint(tiny_checkpoint).sha256
    assert shown["recipe"]["generated"]["captions_sha256"] and shown["recipe"]["extractor"]["name"] == "tiny"
    assert len(shown["recipe"]["classifier"]) == 64
    assert Image.open("sheet.png").width > 160 and json.loads(Path("prompts.json").read_text()) == shown
    run = Project.load("physformer.toml").runs[-1]
    assert {output.path for output in run.outputs} == {"sheet.png", "prompts.json"} and "single" in run.config
    code, out, _ = physformer(*arguments, "--no-record")
    assert code == 0 and "CEILING" in out and "next to" in out and "plain colour" in out
    assert "in everyday words" in out and "edges, their power beside that of real scenes" in out


def test_prompts_threshold(physformer, tiny_features, tiny_checkpoint):
    arguments = ("eval", "prompts", "--checkpoint", tiny_checkpoint, "--size", 32, "--steps", 1, "--phrased", 0)
    code, out, err = physformer(*arguments, "--num", 4, "--relations", 0, "--min-top1", 1, "--min-top5", 0)
    assert code == 3 and "top1 0" in err and "below 1" in err and "TOP-1" in out
    assert Project.load("physformer.toml").runs[-1].status == "failed"
    code, _, err = physformer(*arguments, "--num", 0, "--relations", 2, "--min-relations", 0, "--size", "48x32")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--num", "0", "--relations", "0", "--phrased", "0"), "nothing to measure"),
        (("--num", "0", "--min-top1", "0.5"), "--min-top1 has no effect"),
        (("--relations", "0", "--min-relations", "0.5"), "--min-relations has no effect"),
        (("--size", "huge"), "huge"),
        (("--pairs", "new"), "unknown pairs"),
        (("--pairs", "seen", "--relations", "0"), "--pairs has no effect"),
        (("--held-out-pairs", "0.2"), "--held-out-pairs has no effect"),
        (("--held-out-pairs", "0.01", "--pairs", "seen"), "not from 0.05"),
        (("--checkpoint", "none"), "there is no checkpoint"),
        (("--num", "1", "--size", "32", "--steps", "3,2,1"), "are of 3 levels, and these pictures have 1"),
    ],
)
def test_prompts_mistakes(physformer, tiny_features, arguments, word):
    code, out, err = physformer("eval", "prompts", *arguments)
    assert code == 1 and word in err and out == "", err


def test_reconstruct(physformer, folders):
    code, out, err = physformer("eval", "reconstruct", "pixels", "real", "--num", 2, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["psnr"] is None and shown["exact"] == 2 and shown["ssim"] == pytest.approx(1), err
    code, out, _ = physformer("eval", "reconstruct", "pixels", "real")
    assert code == 0 and "every one exact" in out
    for name in ("r.json", "r_1.json"):
        code, _, err = physformer("eval", "reconstruct", "pixels", "real", "--output", "r.json")
        assert code == 0 and f"wrote {name}" in err
    code, _, err = physformer("eval", "reconstruct", "pixels", "real", "--size", 64)
    assert code == 1 and "--size has no effect" in err


def test_reconstruct_with_an_autoencoder(physformer, folders, tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "vae")  # fmt: skip
    code, out, err = physformer("eval", "reconstruct", tmp_path / "vae", "real", "--min-psnr", 99, "--json")
    shown = json.loads(out)
    assert code == 3 and 0 < shown["psnr"] < 40 and "is below 99" in err and shown["recipe"]["pictures"]["sha256"]


def test_variety(physformer, tiny_features, tiny_checkpoint, scene_set):
    arguments = ("eval", "variety", "--checkpoint", tiny_checkpoint, "--prompts", 2, "--seeds", 3, "--size", 32,
                 "--steps", 1, "--data-dir", scene_set)  # fmt: skip
    code, out, err = physformer(*arguments, "--json", "--contact-sheet", "sheet.png", "-o", "variety.json")
    assert code == 0, err
    shown = json.loads(out)
    assert len(shown["rows"]) == 2 and shown["distance"]["share"] > 0 and shown["recipe"]["generated"]["count"] == 6
    assert 0 <= shown["nearest"]["drawn"]["copies"] <= 1 and shown["nearest"]["examples"] > 0
    assert json.loads(Path("variety.json").read_text()) == shown
    sheet = Image.open("sheet.png")
    assert sheet.height > sheet.width  # two rows a prompt: pictures, and what is nearest to them
    run = Project.load("physformer.toml").runs[-1]
    assert {output.path for output in run.outputs} == {"sheet.png", "variety.json"} and run.data_sha256
    code, out, err = physformer(*arguments[:-2], "--no-record", "--min-share", 99)
    assert code == 3 and "DRAWN" in out and "less than 99" in err and "copies" not in out
    code, _, err = physformer(*arguments[:-1], "nowhere")
    assert code == 1 and "nowhere" in err


def test_steps(physformer, tiny_features, tiny_checkpoint):
    arguments = ("eval", "steps", "3,1,1", "--checkpoint", tiny_checkpoint, "--num", 3, "--size", 32)
    code, out, err = physformer(*arguments, "--json", "--plot", "steps.png", "-o", "steps.json")
    assert code == 0, err
    shown, kept = json.loads(out), json.loads(Path("steps.json").read_text())
    assert [one["steps"] for one in shown["efforts"]] == [1, 3] and len(shown.pop("seconds")) == 2
    assert shown == kept and shown["knee"]["steps"] in (1, 3)
    assert shown["efforts"][0]["evaluations"] < shown["efforts"][1]["evaluations"]
    assert min(one["beyond_least"][0] for one in shown["efforts"]) == 0
    assert Image.open("steps.png").size == (900, 760)
    assert [output.path for output in Project.load("physformer.toml").runs[-1].outputs] == ["steps.json"]
    code, out, _ = physformer(*arguments, "--no-record")
    assert code == 0 and "(knee)" in out
    for wrong in ("0", "a,b", "5,", "", "9" * 5000):
        code, _, err = physformer("eval", "steps", wrong)
        assert code == 1 and "is not a number of steps" in err
