"""What a run begins with: which weights are trained, and that frozen ones stay what they were, to the bit."""

import pytest
import torch
from safetensors.torch import load_file

from physformer_core.config import load_preset
from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.training.trainer import Trainer

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FINE_ALONE = "text_, null_,base."

BASE = {"base_num_layers": 1, "base_hidden_size": 64, "base_num_heads": 2, "base_patch_size": 4}


def make(data, folder, *, init_from=None, **training) -> Trainer:
    config = load_preset("debug").override("model", **BASE).override("training", sample_every=0, **training)
    return Trainer(config, data, folder, device="cpu", init_from=init_from)


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
