"""Integers and scales: what is stored, what comes back, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.quantization.calibration import group_size, quantize_weight
from physformer_core.quantization.storage import (
    FORMAT,
    SCALE,
    VALUES,
    LayerScheme,
    check_description,
    pack_nibbles,
    restore,
    unpack_nibbles,
)

EIGHT, DYNAMIC, FOUR = LayerScheme(8), LayerScheme(8, 0, True), LayerScheme(4, 16)


def weight(rows: int = 24, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def description(bits: int, activations: str = "float") -> dict[str, object]:
    return {"format": FORMAT, "bits": bits, "activations": activations, "layers": {"a": {}}}


def test_two_integers_share_a_byte_and_come_back() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = pack_nibbles(values)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 16)
    assert int(packed[0, 0]) == (-8 + 8) | (-7 + 8) << 4  # the first in the low half
    assert torch.equal(unpack_nibbles(packed), values)


@pytest.mark.parametrize(("scheme", "steps"), [(EIGHT, 127), (FOUR, 7)])
def test_rounding_is_off_by_half_a_step_at_most(scheme: LayerScheme, steps: int) -> None:
    original = weight()
    made = quantize_weight(original, scheme)
    grouped = original.unflatten(1, (-1, scheme.group or 64))
    half = grouped.abs().amax(-1, keepdim=True) / steps / 2
    difference = (made.dequantized() - original).unflatten(1, (-1, scheme.group or 64)).abs()
    # The scale is stored in bfloat16 for 4 bits: half a step more of its last digit at the largest weight.
    assert (difference <= half * 1.001 + (0.004 * grouped.abs() if steps == 7 else 0)).all()
    assert int(made.values.abs().max()) == steps


@pytest.mark.parametrize(
    ("scheme", "activations", "tolerance"), [(EIGHT, "float", 1e-5), (FOUR, "float", 1e-5), (DYNAMIC, "int8", 0.02)]
)
def test_torchao_computes_with_what_was_stored(scheme: LayerScheme, activations: str, tolerance: float) -> None:
    made = quantize_weight(weight(), scheme)
    tensors = {f"a.{name}": tensor for name, tensor in made.stored().items()} | {"b": torch.ones(2)}
    restored = restore(tensors, description(scheme.bits, activations), torch.float32)
    assert restored.keys() == {"a.weight", "b"} and restored["a.weight"].shape == (24, 64)
    rows = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    found, wanted = F.linear(rows, restored["a.weight"]), F.linear(rows, made.dequantized())
    assert found.shape == (3, 7, 24)
    assert float((found - wanted).norm() / wanted.norm()) < tolerance
    if activations == "int8":  # they are really rounded
        assert float((found - wanted).norm() / wanted.norm()) > 1e-4


@pytest.mark.parametrize(("scheme", "activations"), [(EIGHT, "float"), (DYNAMIC, "int8")])
def test_eight_bits_are_not_for_fp16(scheme: LayerScheme, activations: str) -> None:
    tensors = {f"a.{name}": tensor for name, tensor in quantize_weight(weight(), scheme).stored().items()}
    with pytest.raises(ConfigError, match="leaves the range of fp16"):
        restore(tensors, description(8, activations), torch.float16)


def test_a_row_of_zeros_stays_zero() -> None:
    original = weight()
    original[3] = 0
    for scheme in (EIGHT, FOUR):
        made = quantize_weight(original, scheme, torch.ones(64))
        assert made.scale.isfinite().all() and not made.dequantized()[3].any()


@pytest.mark.parametrize("columns", [192, 528, 1152])
def test_groups_divide_their_rows(columns: int) -> None:
    size = group_size(columns, 32)
    assert 8 <= size <= 32 and columns % size == 0
    assert group_size(46, 32) == 23 and group_size(6, 32) == 0


def damaged(change: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    stored = {f"a.{name}": tensor for name, tensor in quantize_weight(weight(), EIGHT).stored().items()}
    told = description(8)
    if change == "missing":
        del stored[f"a.{SCALE}"]
    elif change == "infinite":
        stored[f"a.{SCALE}"][0] = torch.inf
    elif change == "other scales":
        stored[f"a.{SCALE}"] = torch.ones(5, 1)
    elif change == "floats":
        stored[f"a.{VALUES}"] = stored[f"a.{VALUES}"].float()
    elif change == "bits":
        told = description(4)
    return stored, told


@pytest.mark.parametrize("change", ["missing", "infinite", "other scales", "floats", "bits"])
def test_what_does_not_fit_is_refused(change: str) -> None:
    tensors, told = damaged(change)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        restore(tensors, told, torch.float32)
    assert caught.value.hint


@pytest.mark.parametrize("change", [{"format": "other/2"}, {"bits": 3}, {"layers": None}, {"activations": "int4"}])
def test_descriptions_of_other_versions_are_refused(change: dict[str, object]) -> None:
    check_description(description(8))
    with pytest.raises(CheckpointError):
        check_description({**description(8), **change})
