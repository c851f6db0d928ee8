"""`physformer bench` as its users call it: tables, JSON, plots, baselines and exit codes."""

import json

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

TINY = ("--preset", "debug", "--tokens", "64,256", "--repeats", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def measured():
    """A report of a tiny run, made once."""
    from physformer_core.benchmark.campaign import Campaign, run_campaign

    return run_campaign(Campaign(what="model", sizes=((6, 11), (12, 21)), preset="debug", repeats=1, device="cpu"))


@pytest.fixture
def baseline(measured, tmp_path):
    """That report in a file, and a copy of it to be changed."""
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(measured))
    return path, json.loads(path.read_text())


def test_model_report_is_json_and_the_run_is_recorded(physformer, tmp_path):
    code, out, err = physformer("bench", "model", *TINY, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == "physformer-bench/1" and report["what"] == "model"
    machine = report["machine"]
    assert machine["matrix_flops"]["fp32"] > 0 and machine["bandwidth"] > 0 and machine["processor"]
    assert [case["tokens"] for case in report["cases"]] == [66, 252]
    for case in report["cases"]:
        assert case["status"] == "measured" and case["contender"] == "physformer" and case["dtype"] == "fp32"
        assert case["flops"] > 0 and case["bytes"] > 0 and 0 < case["matrix_share"] < 1
        assert case["seconds"] > 0 and len(case["samples"]) == 1
    [fit] = report["fits"]
    assert set(fit["time"]) == {"factor", "exponent", "half_width"}
    text = (tmp_path / "physformer.toml").read_text()
    assert 'command = "bench model"' in text and 'status = "ok"' in text


def test_attention_with_peers_and_a_plot(physformer, tmp_path):
    code, out, err = physformer("bench", "attention", *TINY, "--peers", "all", "--plot", "a.png", "--no-record")
    assert code == 0, err
    assert "sana" in out and "dense" in out
    # What cannot run here says why.
    assert "natten: not run: " in out and "flex: not run: FlexAttention needs CUDA" in out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"


def test_generate(physformer):
    arguments = ("--preset", "debug", "--res", "64x64", "--repeats", "1", "--device", "cpu", "--no-record", "--json")
    code, out, err = physformer("bench", "generate", *arguments)
    assert code == 0, err
    [case] = json.loads(out)["cases"]
    assert case["height"] == case["width"] == 64 and case["flops"] > 0


def test_train(physformer, scene_set):
    arguments = ("--preset", "debug", "--batch-size", "4", "--steps", "2", "--warmup", "1", "--no-compile")
    code, out, err = physformer("bench", "train", "--data-dir", scene_set, *arguments, "--device", "cpu", "--no-record")
    assert code == 0, err
    assert "x the images/s" in out and "waiting for data" in out and "plain, dense" in out


def test_nothing_regressed(physformer, baseline):
    path, report = baseline
    for case in report["cases"]:
        case["seconds"], case["peak_bytes"] = 1e3, 10**12
    path.write_text(json.dumps(report))
    code, _, err = physformer("bench", "model", *TINY, "--no-record", "--baseline", path, "--max-regression", "10%")
    assert code == 0 and "no regression beyond 10 %" in err


def test_a_regression_exits_with_3_and_is_named(physformer, baseline):
    path, report = baseline
    report["cases"][1]["seconds"] = 1e-9
    path.write_text(json.dumps(report))
    code, out, err = physformer(
        "bench", "model", *TINY, "--no-record", "--baseline", path, "--max-regression", "1e6%", "--json"
    )
    assert code == 3
    assert "error: model debug 21x12 batch 1: time was 1e-09, is " in err
    assert err.count("error: ") == 1
    assert json.loads(out)["changes"][0]["figure"] == "time"


@pytest.mark.parametrize(
    ("kind", "tokens", "message"),
    [("attention", "64", "it is of model, not of attention"), ("model", "1024", "it has none of these sizes, but")],
)
def test_a_baseline_of_something_else_is_told_before_anything_runs(physformer, baseline, kind, tokens, message):
    options = ("--tokens", tokens, "--no-record", "--baseline", baseline[0], "--max-regression", "10%")
    code, out, err = physformer("bench", kind, *options)
    assert code == 1 and message in err and out == "" and "measuring" not in err


def test_what_cannot_be_compared_after_all_is_still_told(physformer, baseline):
    path, report = baseline
    for case in report["cases"]:
        case["dtype"] = "fp16"
    path.write_text(json.dumps(report))
    options = ("--no-record", "--json", "--baseline", path, "--max-regression", "10%")
    code, out, err = physformer("bench", "model", *TINY, *options)
    assert code == 1 and "no case in common" in err and len(json.loads(out)["cases"]) == 2


def test_find_batch_size(physformer):
    arguments = ("--preset", "debug", "--tokens", "256", "--device", "cpu", "--no-record", "--json")
    code, out, err = physformer("bench", "model", *arguments, "--find-batch-size", "--memory", "0.02")
    assert code == 0, err
    found = json.loads(out)
    assert found["batch"] >= 1 and found["peak_bytes"] <= found["limit_bytes"] == 20_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--tokens", "a"), "not a list of whole numbers"),
        (("model", "--tokens", "8"), "too small"),
        (("model", "--tokens", "64", "--res", "720p"), "twice"),
        (("model", "--peers", "nobody"), "no peer 'nobody'"),
        (("attention", "--peers", "global"), "no peer 'global'"),
        (("model", "--baseline", "b.json"), "go together"),
        (("model", "--max-regression", "10%"), "go together"),
        (("model", "--baseline", "b.json", "--max-regression", "ten"), "cannot read the baseline"),
        (("model", "--plot", "a.jpg"), "a plot is a PNG file"),
        (("model", "--memory", "4"), "no effect"),
        (("model", "--find-batch-size", "--memory", "nan"), "--memory must be above 0"),
        (("model", "--find-batch-size", "--repeats", "5"), "--repeats has no effect"),
        (("model", "--find-batch-size", "--dtype", "fp32,bf16"), "a second --dtype has no effect"),
        (("model", "--preset", "debug", "--checkpoint", "x"), "--preset has no effect beside --checkpoint"),
        (("attention", "--tokens", "64", "--backend", "nonsense"), "unknown attention backend 'nonsense'"),
        (("attention", "--tokens", "64", "--dtype", ""), "there is no dtype to measure"),
        (("model", "--find-batch-size", "--peers", "sana"), "no effect"),
        (("model", "--preset", "nobody"), "unknown preset"),
        (("train", "--data-dir", "nowhere"), "manifest"),
    ],
)
def test_mistakes_are_told_before_anything_runs(physformer, arguments, message):
    code, out, err = physformer("bench", *arguments, "--no-record")
    assert code == 1 and message in err and out == ""


def test_max_regression_is_a_share():
    from physformer_cli.bench_show import parse_share
    from physformer_core.errors import ConfigError

    assert parse_share("10%") == pytest.approx(0.1) and parse_share("0.25") == 0.25
    assert parse_share("150%") == 1.5
    for text in ("x", "-1%", "inf", "10", "nan"):
        with pytest.raises(ConfigError):
            parse_share(text)
