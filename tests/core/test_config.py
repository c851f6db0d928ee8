"""Presets, and what a configuration file can get wrong."""

from importlib import resources

import pytest
import torch

from physformer_core.config import FlowConfig, RunConfig, TrainConfig, load_preset, preset_names
from physformer_core.errors import ConfigError
from physformer_core.model.transformer import PhysFormerTransformer2DModel


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_its_network_can_be_built(name):
    config = load_preset(name)
    with torch.device("meta"):
        model = PhysFormerTransformer2DModel(**config.model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert RunConfig.from_dict(config.to_dict(), "again") == config


def test_presets_grow():
    sizes = []
    for name in ("debug", "nano", "s", "b", "l", "xl"):
        with torch.device("meta"):
            sizes.append(sum(p.numel() for p in PhysFormerTransformer2DModel(**load_preset(name).model).parameters()))
    assert sizes == sorted(sizes) and 15e6 < sizes[1] < 20e6  # as float16, at most 40 MB
    ladder = {"debug", "overfit", "hparam_tuning", "stability", "full_scale"}
    assert set(preset_names()) == {"nano", "s", "b", "l", "xl"} | ladder


def test_presets_are_what_they_are_called():
    tuning, stability, full = (load_preset(name).training for name in ("hparam_tuning", "stability", "full_scale"))
    assert (tuning.steps, stability.steps, full.steps) == (5_000, 30_000, 300_000)
    assert stability.batch_size == 576 and stability.batch_size % stability.accumulate == 0
    overfit = load_preset("overfit").training
    assert (
        overfit.repeat_batch and 0 < overfit.pass_below < 0.1 and overfit.crop_fraction == overfit.prompt_dropout == 0
    )
    for name in preset_names():
        text = (resources.files("physformer_core") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
        assert text.startswith("# "), "every preset says what it is for"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[training]\nlearning = 1\n", r"\[training\]: unknown key 'learning'", None),
        ("[training]\nbatchsize = 1\n", "unknown key 'batchsize'", "did you mean 'batch_size'?"),
        ("[model]\nhidden = 64\n", r"\[model\]: unknown key 'hidden'", "did you mean 'hidden_size'?"),
        ("[flow]\nstart_nois = 0.1\n", r"\[flow\]: unknown key 'start_nois'", "did you mean 'start_noise'?"),
        ("[train]\nsteps = 1\n", r"unknown table \[train\]", "[model], [flow] or [training]"),
        ('[training]\nsteps = "many"\n', "'steps' must be int, not 'many'", None),
        ("[training]\nsteps = true\n", "'steps' must be int, not True", None),
        ("[training]\nsteps = 1.5\n", "'steps' must be int, not 1.5", None),
        ("[training]\nlr = true\n", "'lr' must be float", None),
        ("[training]\nsteps = 0\n", "steps must be at least 1", None),
        ("[training]\ncrop_fraction = 1.5\n", "crop_fraction must be within 0 and 1", None),
        ("[training]\nema_decay = 1.0\n", "ema_decay must be within 0 and 1", None),
        ("[training]\nlr = nan\n", "lr must be above 0", None),
        ("[training]\nmuon_lr = -0.1\n", "muon_lr must be above 0", None),
        ("[training]\nseed = -1\n", "seed must be at least 0", None),
        ("[training]\nvalidation_batches = 0\n", "validation_batches must be at least 1", None),
        ('[training]\noptimizer = "sgd"\n', "unknown optimizer 'sgd'", "muon or adamw"),
        ('[training]\ndtype = "float8"\n', "unknown dtype 'float8'", "auto, fp32, bf16 or fp16"),
        ('[training]\nparallel = "tp"\n', "unknown way to be parallel 'tp'", "auto, ddp or fsdp"),
        ("[training]\naccumulate = 0\n", "accumulate must be at least 1", None),
        ("[training]\naccumulate = 5\nbatch_size = 4\n", "a batch of 4 cannot be computed in 5 parts", None),
        ("[training]\nkeep_every = 300\ncheckpoint_every = 500\n", "those of every 300 cannot be kept", None),
        ('[training]\nsample_every = 0\nsample_prompts = "a"\n', "sample_prompts have no effect", None),
        ("[training]\ncrop_size = 44\n", "crops of 44 elements are not whole patches of 8", "change crop_size"),
        ("[model]\npatch_size = 0\n", "patch_size must be at least 1", None),
        ("model = 5\n", "model must be a table", None),
        ("[flow]\nstart_noise = nan\n", "start_noise must be above 0", None),
        ("[flow]\nfine_shift = 0.0\n", "std and shift above 0", None),
        ("[flow]\nstart_noise = 0.0\n", "start_noise must be above 0", None),
        ("[training\n", r"bad\.toml: .*line 1", None),
    ],
)
def test_a_bad_file_is_told(tmp_path, text, message, hint):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset(str(path))
    if hint is not None:
        assert caught.value.hint == hint


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        load_preset(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        load_preset(str(tmp_path / "bytes.toml"))
    with pytest.raises(ConfigError, match="unknown preset 'huge'") as caught:
        load_preset("huge")
    assert "nano" in caught.value.hint


def test_the_resolution_shift_moves_times_towards_noise():
    flow = FlowConfig(base_shift=2.0)
    means = [density.sample(4000, torch.Generator().manual_seed(0)).mean() for density in flow.densities()]
    plain = [density.sample(4000, torch.Generator().manual_seed(0)).mean() for density in FlowConfig().densities()]
    assert means[0] < plain[0] - 0.05 and means[1] == plain[1]


def test_whole_numbers_stand_for_fractions(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[training]\ncrop_fraction = 1\ngrad_clip = 2\n")
    assert load_preset(str(path)).training.grad_clip == 2


def test_override():
    config = load_preset("debug")
    changed = config.override("training", steps=5, lr=None)
    assert changed.training.steps == 5 and changed.training.lr == config.training.lr
    assert config.training.steps == 8, "the first one stays"
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        config.override("training", steps=0)


def test_defaults_are_valid():
    assert FlowConfig() and TrainConfig()


@pytest.mark.parametrize("name", ["fine_huber", "coarse_blur", "lora_alpha"])
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_sizes_of_errors_and_blurs_are_numbers_from_0_up(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 0"):
        load_preset("debug").override("training", **{name: value})


def test_compile_is_a_word_or_a_bool() -> None:
    config = load_preset("nano")
    assert config.training.compile == "auto" and load_preset("debug").training.compile == "off"
    assert config.override("training", compile=True).training.compile == "on"
    assert config.override("training", compile=False).training.compile == "off"
    old = {"training": {"compile": True}}
    assert RunConfig.from_dict(old, "an old file").training.compile == "auto"
    with pytest.raises(ConfigError, match="cannot be 'always'"):
        config.override("training", compile="always")


def test_cuda_graphs_are_a_word_or_a_bool() -> None:
    config = load_preset("nano")
    assert config.training.cuda_graphs == "auto"
    assert config.override("training", cuda_graphs=True).training.cuda_graphs == "on"
    for value, word in ((True, "on"), (False, "off"), ("auto", "auto")):
        assert RunConfig.from_dict({"training": {"cuda_graphs": value}}, "a file").training.cuda_graphs == word


def test_one_network_for_all_levels():
    nano = load_preset("nano")
    assert nano.model["base_num_layers"] > 0
    one = nano.of_one_network()
    assert {key: one.model[key] for key in one.model if key.startswith("base_")} == dict.fromkeys(
        ("base_num_layers", "base_hidden_size", "base_num_heads", "base_patch_size"), 0
    )
    rest = {key: value for key, value in nano.model.items() if not key.startswith("base_")}
    assert {key: one.model[key] for key in rest} == rest and one.training == nano.training
    plain = load_preset("debug")
    assert plain.of_one_network() is plain
