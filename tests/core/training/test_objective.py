"""The loss, number by number: a network that has learnt nothing returns zeros, so its loss can be written down."""

import dataclasses

import pytest
import torch

from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.flow.pyramid import DETAIL_SCALE
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.objective import Draws, FlowObjective


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PhysFormerTransformer2DModel(**load_preset("debug").model)


@pytest.fixture(scope="module")
def batches(scene_set):
    """A batch of whole pictures and one of crops."""
    stream = BatchStream(ShardSet(scene_set), seed=0, batch_size=4, crop_fraction=0.5, crop_size=48)
    return {batch.kind: batch for batch in (stream.batch(0), stream.batch(1))}


def objective(**flow) -> FlowObjective:
    config = load_preset("debug").override("flow", **flow).flow
    base, fine = config.densities()
    return FlowObjective(
        path=config.flow_path(), pyramid=config.pyramid(8), base_density=base, fine_density=fine, prompt_dropout=0.5
    )


TIMES = [0.0, 0.5, 0.9, 0.99]
WEIGHTS = torch.tensor([1.0, 2.0, 10.0, 1 + 0.99 / 0.05]).square()
"""1 / (1 - t) squared, and near t = 1 what the margin leaves of it: one late time outweighs a batch of early ones."""


def draws_at(batch, times) -> Draws:
    drawn = objective().draw(batch, torch.Generator().manual_seed(0))
    return dataclasses.replace(drawn, time_b=torch.tensor(times))


def test_a_sample_prediction_weighs_the_end_of_the_path(model, batches):
    batch = batches["base"]
    losses = objective()(model, batch, draws_at(batch, TIMES))
    size = batch.pixels_bchw.square().mean((1, 2, 3))
    torch.testing.assert_close(losses.per_example, size * WEIGHTS, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.mean, losses.per_example.mean())


def test_detail_of_crops_is_counted_in_its_own_unit(model, batches):
    batch = batches["crop"]
    losses = objective()(model, batch, draws_at(batch, TIMES))
    detail = (batch.pixels_bchw - batch.coarse_bchw).square().mean((1, 2, 3)) / DETAIL_SCALE**2
    torch.testing.assert_close(losses.per_example, detail * WEIGHTS, rtol=1e-4, atol=0)


def test_a_velocity_prediction_weighs_all_times_alike(model, batches):
    batch = batches["base"]
    draws = draws_at(batch, TIMES)
    losses = objective(prediction="velocity")(model, batch, draws)
    expected = (batch.pixels_bchw - draws.noise_bchw).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.per_example, expected)
    statistics = losses.statistics
    torch.testing.assert_close(statistics["velocity_target_norm"], expected.mean().sqrt())
    assert statistics["velocity_norm"] < 1e-6, "it predicts none"


@pytest.mark.parametrize("kind", ["base", "crop"])
def test_a_part_of_a_batch_takes_its_own_draws(model, batches, kind):
    batch = batches[kind]
    draws = objective().draw(batch, torch.Generator().manual_seed(1))
    whole = objective()(model, batch, draws).per_example
    parts = [objective()(model, part, draws).per_example for part in batch.parts(3)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_prompts_are_dropped_as_often_as_was_asked_for(batches):
    batch = dataclasses.replace(batches["base"], total=4000)
    drawn = objective().draw(batch, torch.Generator().manual_seed(0))
    assert drawn.drop_b.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert drawn.time_b.min() > 0 and drawn.time_b.max() < 1 and drawn.coarse_noise_bchw is None
