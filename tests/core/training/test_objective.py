"""The loss, number by number: a network that has learnt nothing returns zeros, so its loss can be written down."""

import dataclasses

import pytest
import torch

from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.flow.pyramid import DETAIL_SCALE
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.objective import Draws, FlowObjective, blurred, pseudo_huber


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PhysFormerTransformer2DModel(**load_preset("debug").model)


@pytest.fixture(scope="module")
def batches(scene_set):
    """A batch of whole pictures and one of crops."""
    stream = BatchStream(ShardSet(scene_set), seed=0, batch_size=4, crop_fraction=0.5, crop_size=48)
    return {batch.kind: batch for batch in (stream.batch(0), stream.batch(1))}


def objective(fine_huber: float = 0.0, coarse_blur: float = 0.0, **flow) -> FlowObjective:
    config = load_preset("debug").override("flow", **flow).flow
    base, fine = config.densities()
    return FlowObjective(
        path=config.flow_path(),
        pyramid=config.pyramid(8),
        base_density=base,
        fine_density=fine,
        prompt_dropout=0.5,
        fine_huber=fine_huber,
        coarse_blur=coarse_blur,
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


def test_large_errors_of_crops_count_in_proportion(model, batches):
    batch = batches["crop"]
    losses = objective(fine_huber=0.25)(model, batch, draws_at(batch, TIMES))
    error = (batch.pixels_bchw - batch.coarse_bchw) / DETAIL_SCALE * WEIGHTS.sqrt()[:, None, None, None]
    expected = 2 * 0.25**2 * ((1 + (error / 0.25) ** 2) ** 0.5 - 1)
    torch.testing.assert_close(losses.per_example, expected.mean((1, 2, 3)), rtol=1e-4, atol=1e-9)


def test_errors_of_whole_pictures_are_squared_all_the_same(model, batches):
    batch = batches["base"]
    draws = draws_at(batch, TIMES)
    with_huber, plain = (objective(fine_huber=size)(model, batch, draws) for size in (0.25, 0.0))
    torch.testing.assert_close(with_huber.mean, plain.mean)


def test_pseudo_huber_is_least_between_mean_and_median():
    """Two of three say -1 and one says 1: the mean is -1/3, the median -1."""
    guesses = torch.linspace(-1.2, 1.2, 241)[:, None]

    def best(loss) -> float:
        return guesses[loss(guesses - torch.tensor([-1.0, -1.0, 1.0])).mean(1).argmin()].item()

    assert best(torch.square) == pytest.approx(-1 / 3, abs=0.01)
    assert best(lambda error: pseudo_huber(error, 1e4)) == pytest.approx(-1 / 3, abs=0.01)
    assert -0.95 < best(lambda error: pseudo_huber(error, 0.5)) < -0.6
    assert best(lambda error: pseudo_huber(error, 0.01)) == pytest.approx(-1, abs=0.02)


def test_crops_of_level_2_and_above_start_from_a_blurred_field(model, batches):
    batch = dataclasses.replace(batches["crop"], level_b=torch.tensor([1, 2, 3, 1]))
    blurring = objective(coarse_blur=0.7)
    draws = blurring.draw(batch, torch.Generator().manual_seed(3))
    plain = objective().draw(batch, torch.Generator().manual_seed(3))
    assert draws.blur_b is not None and draws.blur_b.min() >= 0 and draws.blur_b.max() <= 0.7
    for name in ("time_b", "noise_bchw", "drop_b", "coarse_noise_bchw"):
        assert torch.equal(getattr(draws, name), getattr(plain, name)), "whoever blurs draws nothing else anew"
    draws = dataclasses.replace(draws, time_b=torch.zeros(4))
    sigma = 2 * draws.blur_b * torch.tensor([0, 1, 1, 0])
    start = blurred(batch.coarse_bchw, sigma, 1.4)
    assert torch.equal(start[[0, 3]], batch.coarse_bchw[[0, 3]])
    expected = (batch.pixels_bchw - start).square().mean((1, 2, 3)) / DETAIL_SCALE**2
    torch.testing.assert_close(blurring(model, batch, draws).per_example, expected, rtol=1e-4, atol=0)


def test_whole_pictures_have_nothing_to_blur(batches):
    assert objective(coarse_blur=0.7).draw(batches["base"], torch.Generator().manual_seed(0)).blur_b is None


def test_a_blurred_point_is_a_gaussian():
    field = torch.zeros(3, 1, 31, 31)
    field[:, :, 15, 15] = 1
    sigma = torch.tensor([0.0, 1.0, 1.5])
    spread = blurred(field, sigma, 1.5)
    torch.testing.assert_close(spread.sum((1, 2, 3)), torch.ones(3))
    across = (torch.arange(31) - 15.0).square()
    torch.testing.assert_close((spread.sum((1, 2)) * across).sum(1), sigma.square(), rtol=0.03, atol=1e-6)


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
    batch, blurring = batches[kind], objective(coarse_blur=0.7)
    if kind == "crop":
        batch = dataclasses.replace(batch, level_b=torch.tensor([1, 2, 3, 2]))
    draws = blurring.draw(batch, torch.Generator().manual_seed(1))
    whole = blurring(model, batch, draws).per_example
    parts = [blurring(model, part, draws).per_example for part in batch.parts(3)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_prompts_are_dropped_as_often_as_was_asked_for(batches):
    batch = dataclasses.replace(batches["base"], total=4000)
    drawn = objective().draw(batch, torch.Generator().manual_seed(0))
    assert drawn.drop_b.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert drawn.time_b.min() > 0 and drawn.time_b.max() < 1 and drawn.coarse_noise_bchw is None
