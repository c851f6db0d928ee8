"""Training a low-rank adapter: the network stays as it is, the file is diffusers', and it merges to the same."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from physformer_core.checkpoints import find_checkpoint, load_pipeline
from physformer_core.config import load_preset
from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.lora import ADAPTER_FILE, METADATA_KEY, ScaledAdapter, find_adapter, parse_adapter
from physformer_core.training.adapter import adapted_config
from physformer_core.training.checkpoint import list_checkpoints, weights_file
from physformer_core.training.estimate import estimate_run
from physformer_core.training.trainer import Trainer

pytest.importorskip("peft")


def make(data, folder, base, **training) -> Trainer:
    values = {"lora_rank": 2, "lora_alpha": 4.0, "lr": 0.05, "steps": 4, "checkpoint_every": 2, **training}
    config = adapted_config(load_preset("debug").override("training", **values), find_checkpoint(base))
    return Trainer(config, data, folder, device="cpu", init_from=base)


@pytest.fixture(scope="module")
def run(scene_set, tiny_checkpoint, tmp_path_factory):
    """The folder of four steps of an adapter."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    trainer = make(scene_set, folder, tiny_checkpoint)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.run()
    after = dict(trainer.model.named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert changed == {name for name in after if "lora_" in name}, "the adapter alone has changed"
    return folder


@pytest.fixture
def last(run):
    return run / "checkpoints" / "step-00000004"


def test_a_checkpoint_holds_the_adapter_alone(run, last, tiny_checkpoint):
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000004"]
    assert {path.name for path in last.iterdir()} == {"adapter", "state.json", "state.safetensors"}
    assert weights_file(last) == last / "adapter" / ADAPTER_FILE
    adapter = find_adapter(run)
    assert adapter.file == weights_file(last) and adapter.name == "adapter/step-00000004"
    assert (adapter.rank, adapter.config["lora_alpha"]) == (2, 4.0)
    assert adapter.facts == {"base": "tiny", "base_sha256": find_checkpoint(tiny_checkpoint).sha256}
    modules = {module.split(".", 2)[2] for module in adapter.shapes}
    assert modules == {
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        "feed_forward.gate_up",
        "feed_forward.down",
    }
    assert all(value.any() for value in load_file(adapter.file).values())


def test_the_same_run_writes_the_same_bytes(scene_set, run, last, tiny_checkpoint, tmp_path):
    """In another order: stopped after two steps and gone on with."""
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    trainer = make(scene_set, tmp_path / "again", tiny_checkpoint)
    assert trainer.resume("auto") is not None and trainer.step == 2
    assert trainer.run()
    for name in (f"adapter/{ADAPTER_FILE}", "state.safetensors"):
        assert (trainer.checkpoint_dir / "step-00000004" / name).read_bytes() == (last / name).read_bytes()


def test_what_is_merged_is_what_peft_computes(last, tiny_checkpoint):
    plain = load_pipeline(tiny_checkpoint).transformer
    beside = load_pipeline(tiny_checkpoint).transformer
    beside.load_lora_adapter(
        str(last / "adapter"), use_safetensors=True
    )  # diffusers' own reader, as anyone would call it
    adapter = find_adapter(last)
    merged = load_pipeline(tiny_checkpoint, adapters=[ScaledAdapter(adapter, 1.0)]).transformer
    halved = load_pipeline(tiny_checkpoint, adapters=[ScaledAdapter(adapter, 0.5)] * 1).transformer
    twice = load_pipeline(tiny_checkpoint, adapters=[ScaledAdapter(adapter, 0.25), ScaledAdapter(adapter, 0.25)])
    assert merged.state_dict().keys() == plain.state_dict().keys()
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(1, 3, 64, 64, generator=generator)
    tokens, pooled = torch.randn(1, 8, 384, generator=generator), torch.randn(1, 384, generator=generator)

    def output(model):
        with torch.no_grad():
            prompt = model.encode_prompt(tokens, torch.ones(1, 8, dtype=torch.bool), pooled)
            return model(field, torch.tensor([0.5]), prompt, torch.tensor([0]), return_dict=False)[0]

    reference = output(beside)
    assert (reference - output(plain)).abs().max() > 1e-2
    torch.testing.assert_close(output(merged), reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(halved), output(twice.transformer), rtol=1e-4, atol=1e-4)
    assert (output(halved) - reference).abs().max() > 1e-3
    name = "blocks.0.attn.to_v.weight"
    torch.testing.assert_close(
        halved.state_dict()[name] - plain.state_dict()[name],
        (merged.state_dict()[name] - plain.state_dict()[name]) / 2,
    )
    half = load_pipeline(tiny_checkpoint, dtype=torch.bfloat16, adapters=[ScaledAdapter(adapter, 1.0)]).transformer
    assert half.blocks[0].attn.to_v.weight.dtype == torch.bfloat16
    assert half.blocks[0].attn.drift_logit.dtype == torch.float32


def test_the_file_has_one_metadata_key(last):
    """Several would be written in an order that changes from process to process, and so would the file's hash."""
    with safe_open(weights_file(last), framework="pt") as file:
        assert list(file.metadata()) == [METADATA_KEY]


def test_resuming_what_does_not_fit(scene_set, run, tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="of rank 2 and alpha 4, not of rank 3 and alpha 4") as caught:
        make(scene_set, tmp_path, tiny_checkpoint, lora_rank=3).resume(run)
    assert caught.value.hint == "resume it with --lora-rank 2 --lora-alpha 4"
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    weights = load_file(other / "transformer" / "diffusion_pytorch_model.safetensors")
    weights["text_norm.weight"] += 1
    save_file(weights, other / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapts tiny \([0-9a-f]{12}\), not other"):
        make(scene_set, tmp_path, other).resume(run)
    whole = adapted_config(load_preset("debug"), find_checkpoint(tiny_checkpoint))
    with pytest.raises(CheckpointError, match="is of an adapter of rank 2"):
        Trainer(whole, scene_set, tmp_path, device="cpu").resume(run)
    assert Trainer(whole.override("training", steps=1), scene_set, tmp_path / "whole", device="cpu").run()
    with pytest.raises(CheckpointError, match="is of a whole network, not of an adapter"):
        make(scene_set, tmp_path, tiny_checkpoint).resume(tmp_path / "whole")


def test_an_adapter_of_another_model(last, tiny_checkpoint, tmp_path):
    torch.manual_seed(0)
    from physformer_core.model.transformer import PhysFormerTransformer2DModel
    from physformer_core.pipeline import PhysFormerPipeline

    wide = PhysFormerTransformer2DModel(
        hidden_size=64, num_layers=1, num_heads=2, text_hidden_size=32, num_text_layers=1, bottleneck=16
    )
    PhysFormerPipeline(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(tmp_path / "wide", adapters=[parse_adapter(str(last))])
    assert "does not fit wide: it changes blocks.0." in caught.value.message and "\n" not in caught.value.message
    assert "it was trained on tiny" in caught.value.hint


def test_damaged_and_foreign_files(last, tmp_path):
    file = weights_file(last)
    cut = tmp_path / "cut" / ADAPTER_FILE
    cut.parent.mkdir()
    cut.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot read the adapter"):
        find_adapter(cut.parent)
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_A" in key)
    uneven = {**tensors, key: torch.zeros(5, tensors[key].shape[1])}
    for number, (content, message) in enumerate(
        (
            (uneven, "the two halves of .* are not of one rank"),
            ({"unet.down.lora.weight": torch.zeros(2, 2)}, "is no adapter of physformer: it holds unet"),
            ({k: v for k, v in tensors.items() if k != key}, "is damaged: the two halves"),
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(content, path)
        with pytest.raises(CheckpointError, match=message):
            find_adapter(path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        find_adapter(tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="there is no adapter"):
        find_adapter(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        find_adapter(tmp_path)


@pytest.mark.parametrize(("tail", "scale"), [("", 1.0), (":0.5", 0.5), (":-1", -1.0), (":2e0", 2.0)])
def test_a_path_with_a_scale(run, tail, scale):
    one = parse_adapter(f"{run}{tail}")
    assert one.scale == scale and one.adapter.name == "adapter/step-00000004"
    digest = hashlib.sha256(one.adapter.file.read_bytes()).hexdigest()
    assert one.as_dict() == {"name": one.adapter.name, "sha256": digest, "scale": scale}


@pytest.mark.parametrize("tail", [":nan", ":1e9"])
def test_a_scale_out_of_range(run, tail):
    with pytest.raises(ConfigError, match="must be a number from -100 to 100"):
        parse_adapter(f"{run}{tail}")


def test_a_scale_that_is_no_number(run):
    with pytest.raises(ConfigError, match="'strong' is not a scale") as caught:
        parse_adapter(f"{run}:strong")
    assert caught.value.hint == f"--lora {run}:0.8"


def test_a_path_with_a_colon(run, tmp_path):
    folder = tmp_path / "a:b"
    shutil.copytree(run, folder)
    assert parse_adapter(str(folder)).scale == 1.0 and parse_adapter(f"{folder}:3").scale == 3.0


def test_what_an_adapter_costs(scene_set, tiny_checkpoint):
    from physformer_core.data.loader import ShardSet

    shards, checkpoint = ShardSet(scene_set), find_checkpoint(tiny_checkpoint)
    config = adapted_config(load_preset("debug").override("training", lora_rank=2), checkpoint)
    whole = dataclasses.replace(config, training=dataclasses.replace(config.training, lora_rank=0))
    small, large = estimate_run(config, shards), estimate_run(whole, shards)
    assert small.trainable < small.parameters - large.parameters + 1 and large.trainable == large.parameters
    assert small.state_bytes < 0.5 * large.state_bytes and small.flops_per_step < large.flops_per_step


def test_peft_missing(tiny_checkpoint, last, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="LoRA adapters need the package peft") as caught:
        load_pipeline(tiny_checkpoint, adapters=[parse_adapter(str(last))])
    assert caught.value.hint == 'pip install "physformer[lora]"'


def test_what_the_state_says(last):
    metadata = json.loads((last / "state.json").read_text())
    assert metadata["adapter"]["base"] == "tiny" and metadata["config"]["training"]["lora_rank"] == 2
