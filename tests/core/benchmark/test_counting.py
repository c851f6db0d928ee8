"""Counted operations beside torch's own counter and our own formula; counted bytes beside sums done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from physformer_core.benchmark.cases import ATTENTION_PEERS, MODEL_PEERS, OURS, Case, build, why_not
from physformer_core.benchmark.counting import CostCounter
from physformer_core.config import load_preset
from physformer_core.model.flops import picture_flops
from physformer_core.model.native.ops import why_not as native_missing
from physformer_core.model.transformer import PhysFormerTransformer2DModel

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native_missing() is not None, reason=str(native_missing())))


def counted(run) -> CostCounter:
    with torch.inference_mode(), CostCounter() as cost:
        run()
    return cost


@pytest.mark.parametrize(
    ("call", "flops", "elements"),
    [
        (lambda: torch.ones(3, 4) @ torch.ones(4, 5), 2 * 3 * 4 * 5, 12 + 20 + 15),
        (lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 2 * 60, 2 * (12 + 20 + 15)),
        (lambda: torch.baddbmm(torch.ones(1, 3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 240, 2 * 47),
        (lambda: nn.Linear(4, 5)(torch.ones(2, 3, 4)), 2 * 6 * 20, 24 + 20 + 30),
        (
            lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2)(torch.ones(1, 4, 5, 7)),
            2 * 6 * 35 * 9 * 2,
            140 + 108 + 210,
        ),
        (
            lambda: F.scaled_dot_product_attention(*(torch.ones(1, 2, *size) for size in ((3, 8), (5, 8), (5, 6)))),
            2 * 2 * 3 * 5 * (8 + 6),
            48 + 80 + 60 + 36,
        ),
        (lambda: torch.ones(9).sum() + torch.ones(9).square(), 0, 0),
    ],
)  # fmt: skip
def test_one_call(call, flops: int, elements: int) -> None:
    cost = counted(call)
    assert (cost.flops, cost.bytes) == (flops, 4 * elements)


def test_half_precision_moves_half_the_bytes() -> None:
    one = counted(lambda: torch.ones(3, 4, dtype=torch.bfloat16) @ torch.ones(4, 5, dtype=torch.bfloat16))
    assert one.bytes == 2 * 47


@pytest.mark.usefixtures("without_native")  # torch's counter does not see into them
@pytest.mark.parametrize("what", ["model", "attention"])
@pytest.mark.parametrize("contender", [OURS, *dict.fromkeys((*MODEL_PEERS, *ATTENTION_PEERS))])
def test_contenders_are_counted_as_torch_counts_them(what: str, contender: str) -> None:
    if contender != OURS and contender not in {"model": MODEL_PEERS, "attention": ATTENTION_PEERS}[what]:
        pytest.skip("no such contender")
    if reason := why_not(what, contender, torch.device("cpu")):
        pytest.skip(reason)
    subject = build(Case(what=what, contender=contender, preset="debug", height=13, width=18, device="cpu"))
    # The fused attention of CPUs is not in torch's table; written out, the same products are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as expected:
        subject.run()
    cost = counted(subject.run)
    assert cost.flops == expected.get_total_flops() > 0
    assert cost.bytes > 0 and subject.parameters > 0


@pytest.mark.parametrize("backend", ["halo", "dense", NATIVE])
def test_our_network_is_counted_as_its_formula_says(backend: str) -> None:
    subject = build(
        Case(what="model", contender=OURS, preset="debug", backend=backend, height=13, width=18, batch=2, device="cpu")
    )
    with torch.device("meta"):
        model = PhysFormerTransformer2DModel(**load_preset("debug").model)
    model.set_attention_backend(backend)  # type: ignore[arg-type]
    assert counted(subject.run).flops == 2 * picture_flops(model, 13, 18, 16)


def test_global_contender_reads_every_token_and_has_our_weights() -> None:
    cases = [
        Case(what="model", contender=name, preset="debug", height=24, width=24, device="cpu")
        for name in (OURS, "global")
    ]
    ours, everything = (build(case) for case in cases)
    assert ours.parameters == everything.parameters
    layers, width = (load_preset("debug").model[key] for key in ("num_layers", "hidden_size"))
    pairs = 576 * (576 + 16)
    with torch.device("meta"):
        model = PhysFormerTransformer2DModel(**load_preset("debug").model)
    model.set_attention_backend("dense")
    assert counted(everything.run).flops == picture_flops(model, 24, 24, 16)
    assert 4 * pairs * width * layers < counted(everything.run).flops
