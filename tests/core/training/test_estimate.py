"""What a run is said to cost: operations held to torch's counter, memory to what autograd keeps."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.errors import ConfigError
from physformer_core.model.flops import picture_flops, prompt_flops, training_flops
from physformer_core.model.native.ops import why_not as native_missing
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.estimate import estimate_run
from physformer_core.training.optimizer import NEWTON_SCHULZ_STEPS, orthogonalize
from physformer_core.training.trainer import Trainer

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native_missing() is not None, reason=str(native_missing())))


def counted(function) -> int:
    # The fused attention of CPUs is not in torch's table; written out, the same products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        counted.result = function()
    return counter.get_total_flops()


# One dense call; dense with a window that does not cover the field; blocks with halos.
@pytest.mark.usefixtures("without_native")  # torch's counter does not see into them
@pytest.mark.parametrize(("height", "width", "batch"), [(8, 8, 3), (4, 24, 2), (18, 21, 1)])
def test_operations_agree_with_torch(height, width, batch):
    torch.manual_seed(0)
    model = PhysFormerTransformer2DModel(**load_preset("debug").model)
    tokens = 16
    embeds, mask = torch.randn(batch, tokens, 384), torch.ones(batch, tokens, dtype=torch.bool)
    pooled, drop = torch.randn(batch, 384), torch.zeros(batch, dtype=torch.bool)
    field = torch.randn(batch, 3, 8 * height, 8 * width)
    level = torch.ones(batch, dtype=torch.long)

    prompt = counted(lambda: model.encode_prompt(embeds, mask, pooled, drop))
    encoded = counted.result
    forward = counted(lambda: model(field, torch.rand(batch), encoded, level, field).sample)
    loss = counted.result.square().mean()
    backward = counted(loss.backward)

    assert prompt == batch * prompt_flops(model, tokens)
    assert forward == batch * picture_flops(model, height, width, tokens)
    assert prompt + forward + backward == batch * training_flops(model, height, width, tokens)


@pytest.mark.usefixtures("without_native")
def test_the_refiner_works_at_level_0_alone():
    model = PhysFormerTransformer2DModel(**load_preset("debug").model | {"refiner_channels": 8})
    embeds, mask, pooled = torch.randn(2, 16, 384), torch.ones(2, 16, dtype=torch.bool), torch.randn(2, 384)
    field, time = torch.randn(2, 3, 32, 40, requires_grad=True), torch.rand(2)
    encoded = model.encode_prompt(embeds, mask, pooled)
    for base in (True, False):
        level, coarse = torch.full((2,), int(not base)), None if base else field
        forward = counted(lambda level=level, coarse=coarse: model(field, time, encoded, level, coarse).sample)
        assert forward == 2 * picture_flops(model, 4, 5, 16, base=base)
    assert picture_flops(model, 4, 5, 16, base=True) > picture_flops(model, 4, 5, 16)


BASE = {"base_num_layers": 3, "base_hidden_size": 48, "base_num_heads": 2, "base_patch_size": 4}


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("base", [True, False])
def test_operations_of_a_network_for_level_0(base):
    model = PhysFormerTransformer2DModel(**load_preset("debug").model | BASE | {"refiner_channels": 4})
    batch, tokens, (height, width) = 2, 16, (8, 10) if base else (4, 5)
    embeds, mask = torch.randn(batch, tokens, 384), torch.ones(batch, tokens, dtype=torch.bool)
    field = torch.randn(batch, 3, 32, 40)
    drop, level = torch.zeros(batch, dtype=torch.bool), torch.full((batch,), int(not base))
    prompt = counted(lambda: model.encode_prompt(embeds, mask, torch.randn(batch, 384), drop, base=base))
    encoded = counted.result
    forward = counted(lambda: model(field, torch.rand(batch), encoded, level, None if base else field).sample)
    assert prompt == batch * prompt_flops(model, tokens, base=base)
    assert forward == batch * picture_flops(model, height, width, tokens, base=base)
    assert prompt_flops(model, tokens) > max(prompt_flops(model, tokens, base=one) for one in (True, False))
    # Torch counts the way back of the refiner's first convolution into the field, for which nobody asks.
    loss = counted.result.square().mean()
    everything = prompt + forward + counted(loss.backward)
    assert everything == pytest.approx(batch * training_flops(model, height, width, tokens, base=base), rel=0.02)


@pytest.mark.parametrize("backend", ["halo", NATIVE])
def test_attention_is_linear_in_tokens(backend):
    model = PhysFormerTransformer2DModel(**load_preset("debug").model)
    model.set_attention_backend(backend)
    one, four = picture_flops(model, 64, 64, 16), picture_flops(model, 128, 128, 16)
    # At the border halo computes what is not there, and native saves what is not there.
    assert 3.8 < four / one < 4.0 if backend == "halo" else 4.0 < four / one < 4.2


@pytest.mark.usefixtures("without_native")  # torch's counter does not see into them
def test_a_run(scene_set, tmp_path):
    config = load_preset("debug")
    shards = ShardSet(scene_set)
    estimate = estimate_run(config, shards)
    trainer = Trainer(config, scene_set, tmp_path, device="cpu")
    trainer.run()

    parameters = sum(p.numel() for p in trainer.model.parameters())
    state = sum(t.numel() for t in trainer.optimizer.state_tensors().values() if t.ndim)
    assert estimate.parameters == parameters
    assert estimate.state_bytes == 4 * (3 * parameters + state)  # and as many gradients and averages as weights
    assert estimate.steps_per_epoch["base"] == pytest.approx(shards.count("base") / 4 / 0.5)

    muon = counted(
        lambda: [
            orthogonalize(p.detach()[None], NEWTON_SCHULZ_STEPS, torch.float32)
            for part, _ in trainer.optimizer.parts[1:]
            for group in part.param_groups
            for p in group["params"]
        ]
    )
    assert muon < estimate.flops_per_step < muon + 10 * 64 * 4 * parameters * 6


def test_what_is_frozen_is_not_counted(scene_set, tmp_path):
    config = load_preset("debug")
    whole = estimate_run(config, ShardSet(scene_set))
    frozen = config.override("training", freeze="text_,null_")
    part = estimate_run(frozen, ShardSet(scene_set))
    trainer = Trainer(frozen, scene_set, tmp_path, device="cpu")
    assert part.trainable == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) < whole.trainable
    assert part.flops_per_step < whole.flops_per_step and part.state_bytes < whole.state_bytes
    with pytest.raises(ConfigError, match="would train nothing"):
        estimate_run(
            config.override("training", freeze="blocks.,patch_,condition_,final_,text_,null_"), ShardSet(scene_set)
        )


@pytest.mark.usefixtures("without_native")
def test_activations_are_what_autograd_keeps(scene_set, tmp_path):
    config = load_preset("debug").override("training", crop_fraction=0.0, steps=1)
    estimate = estimate_run(config, ShardSet(scene_set))
    trainer = Trainer(config, scene_set, tmp_path, device="cpu")
    batch = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.0).batch(0)
    batch.prompt_mask_bt.fill_(True)  # padding, which a CPU leaves out, is counted
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    draws = trainer.objective.draw(batch, torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.objective(trainer.model, batch, draws)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert estimate.activation_bytes == pytest.approx(measured, rel=0.1)


def test_large_networks_are_estimated_without_being_built(scene_set):
    shards = ShardSet(scene_set)
    small, large = (
        estimate_run(load_preset(name).override("training", batch_size=4, steps=2), shards) for name in ("s", "xl")
    )
    assert small.parameters < large.parameters and small.activation_bytes < large.activation_bytes
    assert large.parameters > 500e6
