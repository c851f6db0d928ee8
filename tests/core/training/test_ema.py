"""The average of the weights."""

import pytest
import torch
from torch import nn

from physformer_core.training.ema import WeightAverage


def layer(value: float) -> nn.Linear:
    made = nn.Linear(2, 2, bias=False)
    nn.init.constant_(made.weight, value)
    return made


def test_it_starts_as_the_weights_and_stays_with_constant_ones():
    made = layer(3.0)
    average = WeightAverage(made, 0.99)
    for step in range(5):
        average.update(step)
    assert torch.equal(average.shadow["weight"], made.weight)


def test_it_is_the_average_it_says():
    made = layer(0.0)
    average = WeightAverage(made, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 4.0, 2.0, 8.0]):
        nn.init.constant_(made.weight, value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))  # early weights are forgotten sooner
        expected = decay * expected + (1 - decay) * value
    assert average.shadow["weight"].flatten().tolist() == pytest.approx([expected] * 4)


def test_it_does_not_share_memory_with_the_weights():
    made = layer(1.0)
    average = WeightAverage(made, 0.9)
    with torch.no_grad():
        made.weight.add_(1)
    assert average.shadow["weight"].eq(1).all()


def test_the_average_of_half_precision_weights_is_float32():
    made = layer(1.0).to(torch.bfloat16)
    average = WeightAverage(made, 0.9)
    assert average.shadow["weight"].dtype == torch.float32


def test_swapping_in_and_out():
    made = layer(1.0)
    average = WeightAverage(made, 0.5)
    nn.init.constant_(made.weight, 5.0)
    average.swap_in(made)
    assert made.weight.eq(1).all()
    average.swap_out(made)
    assert made.weight.eq(5).all() and average.shadow["weight"].eq(1).all()
