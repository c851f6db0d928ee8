"""What a run begins with: which weights are trained, and that frozen ones stay what they were, to the bit."""

import pytest
import torch
from safetensors.torch import load_file

from physformer_core.config import load_preset
from physformer_core.data.shard_set import ShardSet
from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.model.patch_size import resampling
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.initial import first_network
from physformer_core.training.trainer import Trainer

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FINE_ALONE = "text_, null_,base."

BASE = {"base_num_layers": 1, "base_hidden_size": 64, "base_num_heads": 2, "base_patch_size": 4}


def debug(sizes=None, **training):
    model = BASE | (sizes or {})
    return load_preset("debug").override("model", **model).override("training", sample_every=0, **training)


def make_with(data, folder, sizes, *, init_from=None, **training) -> Trainer:
    return Trainer(debug(sizes, **training), data, folder, device="cpu", init_from=init_from)


def make(data, folder, **options) -> Trainer:
    return make_with(data, folder, {}, **options)


def resized_field(field, old, new):
    """A field [B, C, H, W] with patches of another size."""
    across = resampling(new, old).float()
    patches = field.unflatten(3, (-1, old)).unflatten(2, (-1, old)).transpose(3, 4)
    return (across @ patches @ across.T).transpose(3, 4).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def seen(model, field):
    """What its network of level 0 makes of a field under no prompt."""
    count = field.shape[0]
    no_text = torch.zeros(count, 8, model.config.text_dim), torch.ones(count, 8, dtype=torch.bool)
    pooled, drop = torch.zeros(count, model.config.pooled_dim), torch.ones(count, dtype=torch.bool)
    prompt = model.encode_prompt(*no_text, pooled, drop)
    time, level = torch.full((count,), 0.4), torch.zeros(count, dtype=torch.long)
    return model.eval()(field, time, prompt, level, return_dict=False)[0]


@pytest.fixture(scope="module")
def start(scene_set, tmp_path_factory):
    """A checkpoint with a network of its own for level 0, after two steps."""
    trainer = make(scene_set, tmp_path_factory.mktemp("runs") / "start", steps=2)
    assert trainer.run()
    return trainer.checkpoint_dir / "step-00000002"


@pytest.fixture(scope="module")
def frozen_run(scene_set, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "frozen"
    assert make(scene_set, folder, init_from=start, crop_fraction=1.0, freeze=FINE_ALONE, steps=4).run()
    return folder / "checkpoints" / "step-00000004"


def test_frozen_weights_stay_and_the_others_are_trained(start, frozen_run):
    before, after = load_file(start / WEIGHTS), load_file(frozen_run / WEIGHTS)
    assert before.keys() == after.keys()
    frozen = {name for name in before if name.startswith(("text_", "null_", "base."))}
    assert len(frozen) > 20 and len(before) - len(frozen) > 20
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == frozen


def test_a_frozen_run_is_resumed_to_the_same_bits(scene_set, start, frozen_run, tmp_path):
    options = {"crop_fraction": 1.0, "freeze": FINE_ALONE, "steps": 4}
    first = make(scene_set, tmp_path, init_from=start, **options)
    first.on_step = lambda step: first.request_stop() if step == 3 else None
    assert not first.run()
    second = make(scene_set, tmp_path, **options)  # frozen weights, too, come from the checkpoint alone
    second.resume("auto")
    assert second.run()
    for name in (WEIGHTS, "state.safetensors"):
        one, two = load_file(frozen_run / name), load_file(second.checkpoint_dir / "step-00000004" / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_is_not_resumed_with_other_weights_frozen(scene_set, frozen_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"'text_, null_,base\.' frozen, this run has ''"):
        make(scene_set, tmp_path, crop_fraction=1.0).resume(frozen_run)


def test_names_that_freeze_nothing_are_refused(scene_set, tmp_path):
    with pytest.raises(ConfigError, match="no weights begin with 'texts'") as caught:
        make(scene_set, tmp_path, freeze="base.,texts")
    assert "text_blocks" in caught.value.hint
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"freeze": FINE_ALONE}, "whole pictures"),
        ({"freeze": "text_,null_,blocks.,patch_,condition_,final_"}, "crops"),
        ({"freeze": "text_,null_,blocks.,patch_,condition_,final_", "crop_fraction": 0.0}, None),
        ({"freeze": "base.,blocks."}, None),
    ],
)
def test_steps_that_would_train_nothing_are_refused(scene_set, tmp_path, options, what):
    if what is None:
        make(scene_set, tmp_path, **options)
        return
    with pytest.raises(ConfigError, match=f"steps on {what} would train nothing"):
        make(scene_set, tmp_path, **options)


def test_an_adapter_freezes_by_itself():
    with pytest.raises(ConfigError, match="freeze has no effect with lora_rank"):
        load_preset("debug").override("training", lora_rank=4, freeze="text_")


def test_level_0_goes_on_with_larger_patches(scene_set, start, tmp_path):
    """Of pictures half as large again, level 0 sees and draws what it did."""
    before = PhysFormerTransformer2DModel.from_pretrained(start / "transformer")
    torch.nn.init.normal_(before.base.final_layer.proj_out.weight, std=0.1)
    before.save_pretrained(tmp_path / "start" / "transformer")
    small = torch.randn(2, 3, 16, 24)
    wide = resized_field(small, 4, 6)
    assert wide.shape == (2, 3, 24, 36)
    trainer = make_with(scene_set, tmp_path / "run", {"base_patch_size": 8}, init_from=tmp_path / "start", steps=1)
    assert trainer.model.config.base_patch_size == 8 and trainer.run()
    assert len(trainer.changes) == 1 and "patches of 4 are resized to 8" in trainer.changes[0]
    after = first_network(debug({"base_patch_size": 6}), trainer.shards, tmp_path / "start")[0]
    assert torch.allclose(seen(after, wide), resized_field(seen(before, small), 4, 6), atol=1e-4)
    assert not torch.allclose(seen(after, wide), torch.zeros(()), atol=1e-2)


def test_a_refiner_of_larger_patches_corrects_nothing_at_first(scene_set, start, tmp_path):
    refined = {"refiner_channels": 4}
    before = PhysFormerTransformer2DModel(**PhysFormerTransformer2DModel.load_config(start / "transformer") | refined)
    for network in before.networks():
        for layer in network.zero_at_first():
            torch.nn.init.normal_(layer.weight, std=0.1)
    before.save_pretrained(tmp_path / "transformer")
    shards = ShardSet(scene_set)
    after = first_network(debug({"base_patch_size": 6} | refined), shards, tmp_path)[0]
    field = torch.randn(2, 3, 24, 36)
    with_refiner = seen(after, field)
    after.base.refiner = None
    assert torch.equal(with_refiner, seen(after, field)) and with_refiner.std() > 0.1


def test_pictures_that_are_not_whole_patches_are_refused(scene_set, start, tmp_path):
    with pytest.raises(ConfigError, match="not whole patches of 6") as caught:
        make_with(scene_set, tmp_path, {"base_patch_size": 6}, init_from=start)
    assert "--buckets" in caught.value.hint
