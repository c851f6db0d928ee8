"""Backends against attention written out token by token from the design's formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.model import attention
from physformer_core.model.attention import (
    BACKENDS,
    DENSE_TOKENS,
    PhysFormerAttention,
    TextKeyValue,
    Transport,
    plan_attention,
)
from physformer_core.model.geometry import FAR, GEOMETRY_DIM, BlockGrid, same_window
from physformer_core.model.native.ops import why_not

HEADS, CONTENT, HEAD_DIM = 2, 8, 16
NATIVE = pytest.param("native", marks=pytest.mark.skipif(why_not() is not None, reason=str(why_not())))


@dataclass
class Case:
    """Random content of a field and of a text, and the kernel of each head."""

    grid: BlockGrid
    query: Tensor
    key: Tensor
    value: Tensor
    text_key: Tensor
    text_value: Tensor
    text_mask: Tensor
    altitude: Tensor
    drift: Tensor
    sigma: Tensor

    @classmethod
    def draw(cls, grid: BlockGrid, *, batch: int = 2, text: int = 3, hidden: int = 0, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tokens = grid.height * grid.width
        mask = torch.arange(text)[None].expand(batch, -1) < text - hidden
        return cls(
            grid,
            normal(batch, tokens, HEADS, CONTENT) * CONTENT**-0.5,
            normal(batch, tokens, HEADS, CONTENT),
            normal(batch, tokens, HEADS, HEAD_DIM),
            normal(batch, HEADS, text, CONTENT),
            normal(batch, HEADS, text, HEAD_DIM),
            mask,
            2 * normal(HEADS),
            4 * torch.rand(HEADS, 2, generator=generator) - 2,
            0.8 + 2.2 * torch.rand(HEADS, generator=generator),
        )

    def run(self, backend: str) -> Tensor:
        """[B, N, heads, head_dim] by a backend of the module."""
        text = None
        if self.text_key.shape[2]:
            altitude = torch.where(self.text_mask[:, None], self.altitude[None, :, None], -FAR)
            geometry = torch.zeros(*self.text_key.shape[:3], GEOMETRY_DIM)
            geometry[..., 4] = geometry[..., 5] = altitude
            text = TextKeyValue(torch.cat([self.text_key, geometry], dim=-1), self.text_value)
        nothing = torch.zeros(1)
        plan = plan_attention(self.grid, backend, nothing, nothing, torch.float32)  # type: ignore[arg-type]
        transport = Transport(self.drift, self.sigma)
        return BACKENDS[plan.backend](self.query, self.key, self.value, text, transport, plan)

    def written_out(self) -> Tensor:
        """softmax(q k - |x_q + d - x_k|^2 / 2 sigma^2 over the block's window, q k_text + c) times the values."""
        grid, batch = self.grid, self.query.shape[0]
        places = [(y + grid.origin[0], x + grid.origin[1]) for y in range(grid.height) for x in range(grid.width)]
        yx = torch.tensor(places, dtype=torch.float64).reshape(-1, 2)
        result = torch.zeros_like(self.value, dtype=torch.float64)
        for index, (y, x) in enumerate(places):
            seen = torch.ones(len(places), dtype=torch.bool)
            for axis, position in enumerate((y, x)):
                start = (position + grid.shift) // grid.block * grid.block - grid.shift
                seen &= (yx[:, axis] >= start - grid.radius) & (yx[:, axis] < start + grid.block + grid.radius)
            for b in range(batch):
                told = self.text_mask[b]
                for h in range(HEADS):
                    upstream = yx[index] + self.drift[h].double()
                    distance = (upstream - yx[seen]).square().sum(-1)
                    query = self.query[b, index, h].double()
                    logits = torch.cat([
                        self.key[b, seen, h].double() @ query - distance / (2 * self.sigma[h].double() ** 2),
                        self.text_key[b, h, told].double() @ query + self.altitude[h] / self.sigma[h].double() ** 2,
                    ])  # fmt: skip
                    values = torch.cat([self.value[b, seen, h], self.text_value[b, h, told]]).double()
                    result[b, index, h] = logits.softmax(0) @ values
        return result.float()


GRIDS = [
    BlockGrid(height=1, width=1, block=8, radius=4),
    BlockGrid(height=3, width=2, block=8, radius=4, shift=4),
    BlockGrid(height=8, width=8, block=8, radius=4, shift=4),
    BlockGrid(height=5, width=17, block=8, radius=4),
    BlockGrid(height=11, width=13, block=4, radius=3, shift=2, origin=(5, 2)),
    BlockGrid(height=19, width=7, block=8, radius=4, shift=4, origin=(3, 70)),
    BlockGrid(height=9, width=9, block=2, radius=1, shift=1, origin=(1, 0)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.height}x{g.width}b{g.block}s{g.shift}")
@pytest.mark.parametrize("backend", ["reference", "dense", "halo", NATIVE])
def test_backends_equal_attention_written_out(grid: BlockGrid, backend: str) -> None:
    case = Case.draw(grid, batch=2, text=4, hidden=1, seed=grid.height)
    assert (case.run(backend) - case.written_out()).abs().max() < 1e-5


@settings(deadline=None, max_examples=15)
@given(
    height=st.integers(1, 14), width=st.integers(1, 14), block=st.sampled_from([2, 4, 8]), radius=st.integers(1, 6),
    shifted=st.booleans(), y=st.integers(0, 9), x=st.integers(0, 9), batch=st.integers(1, 3),
    text=st.integers(0, 5), hidden=st.integers(0, 2),
)  # fmt: skip
def test_backends_agree_at_any_size(
    height: int, width: int, block: int, radius: int, shifted: bool, y: int, x: int, batch: int, text: int, hidden: int
) -> None:
    shift = block // 2 if shifted else 0
    grid = BlockGrid(height=height, width=width, block=block, radius=radius, shift=shift, origin=(y, x))
    case = Case.draw(grid, batch=batch, text=text, hidden=min(hidden, text), seed=height * width)
    halo = case.run("halo")
    assert (halo - case.run("dense")).abs().max() < 1e-5
    if why_not() is None:
        assert (halo - case.run("native")).abs().max() < 1e-5
    if height * width * batch <= 60:
        assert (halo - case.written_out()).abs().max() < 1e-5


def test_narrowest_kernel_keeps_its_precision() -> None:
    case = Case.draw(GRIDS[4], seed=7)
    case.sigma = torch.full((HEADS,), 0.3)
    for backend in ("dense", "halo"):
        assert (case.run(backend) - case.written_out()).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["reference", "dense", "halo", NATIVE])
@pytest.mark.parametrize("drift", [(0, 0), (-1, 2), (2, 1)])
def test_an_impulse_moves_against_the_drift(backend: str, drift: tuple[int, int]) -> None:
    """x_q + d = x_k: a token reads what lies d away, so what stood at x is read at x - d."""
    grid = BlockGrid(height=13, width=14, block=4, radius=4, shift=2)
    case = Case.draw(grid, batch=1, text=0)
    case.query.zero_()
    case.value.zero_()
    case.drift, case.sigma = torch.tensor([drift, drift]).float(), torch.full((HEADS,), 0.3)
    case.value[0, 6 * 14 + 7] = 1.0
    spread = case.run(backend)[0, :, 0, 0].reshape(13, 14)
    assert divmod(int(spread.argmax()), 14) == (6 - drift[0], 7 - drift[1])
    assert spread.max() > 0.95
    # A wide kernel moves the centre of mass by as much.
    case.sigma = torch.full((HEADS,), 0.8)
    wide = case.run(backend)[0, :, 0, 0].reshape(13, 14)
    centre = (wide.sum(1) @ torch.arange(13.0) / wide.sum(), wide.sum(0) @ torch.arange(14.0) / wide.sum())
    assert centre == pytest.approx((6 - drift[0], 7 - drift[1]), abs=0.05)


def test_chunks_of_rows_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.draw(BlockGrid(height=21, width=9, block=4, radius=2, shift=2, origin=(3, 1)))
    with torch.no_grad():
        whole = case.run("halo")
        for size in (1, 30_000, 60_000):
            monkeypatch.setattr(attention, "CHUNK_WINDOW_BYTES", size)
            assert torch.equal(case.run("halo"), whole)


@pytest.mark.parametrize("backend", ["dense", "halo", NATIVE])
@pytest.mark.parametrize(("height", "width"), [(6, 7), (1, 3), (9, 17)])
def test_gradients_equal_those_written_out(backend: str, height: int, width: int) -> None:
    case = Case.draw(BlockGrid(height=height, width=width, block=4, radius=2, shift=2), batch=1)
    gradients = []
    for run in (lambda: case.run(backend), case.written_out):
        leaves = [case.query, case.key, case.value, case.drift, case.sigma, case.text_key]
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        (run() * torch.arange(HEAD_DIM)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for found, written in zip(*gradients, strict=True):
        assert (found - written).abs().max() < 2e-5 * written.abs().max()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.height}x{g.width}b{g.block}s{g.shift}")
def test_the_work_of_windows_is_counted_pair_by_pair(grid: BlockGrid) -> None:
    seen = same_window(grid)
    text = 3
    keys, pairs = grid.window_work(text)
    assert pairs == int(seen.sum()) + text * len(seen)
    one_of_a_block = {
        ((y + grid.lead[0]) // grid.block, (x + grid.lead[1]) // grid.block): y * grid.width + x
        for y in range(grid.height)
        for x in range(grid.width)
    }
    assert keys == sum(int(seen[token].sum()) + text for token in one_of_a_block.values())


def test_hidden_text_and_no_text() -> None:
    grid = BlockGrid(height=5, width=9, block=4, radius=2)
    for backend in ("reference", "dense", "halo"):
        told = Case.draw(grid, text=4, hidden=2)
        short = Case(**{**vars(told), "text_key": told.text_key[:, :, :2], "text_value": told.text_value[:, :, :2],
                        "text_mask": told.text_mask[:, :2]})  # fmt: skip
        assert (told.run(backend) - short.run(backend)).abs().max() < 1e-6
        silent = Case.draw(grid, text=3, hidden=3)
        none = Case(**{**vars(silent), "text_key": silent.text_key[:, :, :0]})
        assert (silent.run(backend) - none.run(backend)).abs().max() < 1e-6


def module_written_out(
    attn: PhysFormerAttention, tokens: Tensor, text_states: Tensor, mask: Tensor, grid: BlockGrid
) -> Tensor:
    """The module from its weights in float64: projections, norms, rotation, kernel, text, output."""
    attn = attn.double()
    batch, heads, turning = tokens.shape[0], attn.heads, attn.rotary_dim

    def heads_of(flat: Tensor) -> Tensor:
        return flat.reshape(*flat.shape[:2], heads, -1)

    def rms(t: Tensor, gain: Tensor) -> Tensor:
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turn(t: Tensor) -> Tensor:
        """Pairs (i, i + turning / 2) as complex numbers; pairs of the first half of them turn with y."""
        pairs = turning // 4
        frequency = [math.pi / 2 * 16 ** (-i / max(pairs - 1, 1)) for i in range(pairs)]
        angle = torch.tensor([
            [(y + grid.origin[0]) * w for w in frequency] + [(x + grid.origin[1]) * w for w in frequency]
            for y in range(grid.height) for x in range(grid.width)
        ], dtype=torch.float64)  # fmt: skip
        z = torch.complex(t[..., : turning // 2], t[..., turning // 2 : turning])
        z = z * torch.polar(torch.ones_like(angle), angle)[None, :, None]
        return torch.cat([z.real, z.imag, t[..., turning:]], dim=-1)

    x, c = tokens.double(), text_states.double()
    query = turn(rms(heads_of(x @ attn.to_q.weight.T), attn.norm_q.weight)) / math.sqrt(attn.content_dim)
    key = turn(rms(heads_of(x @ attn.to_k.weight.T), attn.norm_k.weight))
    still = rms(heads_of(c @ attn.add_k_proj.weight.T), attn.norm_added_k.weight)
    text_key = torch.cat([torch.zeros(*still.shape[:3], turning, dtype=torch.float64), still], dim=-1)
    case = Case(
        grid, query, key, heads_of(x @ attn.to_v.weight.T), text_key.transpose(1, 2),
        heads_of(c @ attn.add_v_proj.weight.T).transpose(1, 2), mask, attn.text_altitude,
        attn.max_drift * attn.drift_logit.tanh(), 0.3 + (attn.max_sigma - 0.3) * attn.sigma_logit.sigmoid(),
    )  # fmt: skip
    return case.written_out().reshape(batch, grid.height * grid.width, -1).double() @ attn.to_out[0].weight.T


def test_the_module_is_the_formula() -> None:
    torch.manual_seed(1)
    attn = PhysFormerAttention(HEADS * 24, HEADS, 12, max_drift=2.0, max_sigma=3.0)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    grid = BlockGrid(height=6, width=9, block=4, radius=3, shift=2, origin=(3, 7))
    tokens, text_states = torch.randn(2, 54, HEADS * 24), torch.randn(2, 4, 12)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    from physformer_core.model.geometry import rotary_angles

    angles = rotary_angles(6, 9, grid.origin, attn.rotary_dim, torch.device("cpu")).flatten(0, 1)
    with torch.no_grad():
        text = attn.encode_text(text_states, mask)
        outputs = {}
        for backend in ("reference", "dense", "halo"):
            plan = plan_attention(
                grid, backend, angles.cos()[None, :, None], angles.sin()[None, :, None], torch.float32
            )
            outputs[backend] = attn(tokens, text, plan)
        written = module_written_out(attn, tokens, text_states, mask, grid)
    for output in outputs.values():
        assert (output - written).abs().max() < 2e-5


def test_drifts_start_at_the_compass_and_stay_bounded() -> None:
    attn = PhysFormerAttention(96, 4, 12, max_drift=2.0, max_sigma=3.0)
    assert torch.allclose(attn.drift(), torch.tensor([[-1.0, 0], [0, 1], [1, 0], [0, -1]]), atol=1e-5)
    with torch.no_grad():
        attn.drift_logit.fill_(1e4)
        attn.sigma_logit.copy_(torch.tensor([-1e4, 1e4, 0, 0]))
    assert torch.equal(attn.drift(), torch.full((4, 2), 2.0))
    assert torch.allclose(attn.sigma()[:2], torch.tensor([0.3, 3.0]))
    still = PhysFormerAttention(96, 4, 12, max_drift=2.0, max_sigma=3.0, drift=False)
    assert not still.drift().any() and (still.sigma() == attention.FLAT_SIGMA).all()


def test_autocast_splits_the_geometry_for_the_dtype_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast norms in float32: what leaves the projections must be the dtype of the products all the same."""
    norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda t, s, w, e: norm(t.float(), s, w, e))
    attn = PhysFormerAttention(96, 4, 12, max_drift=2.0, max_sigma=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        nothing = torch.zeros(1, 4, 1, attn.rotary_dim // 2)
        projected = attn.project(torch.randn(1, 4, 96), nothing, nothing)
        text = attn.encode_text(torch.randn(1, 2, 12), torch.ones(1, 2, dtype=torch.bool))
    assert {t.dtype for t in (*projected, text.key, text.value)} == {torch.bfloat16}


def test_auto_takes_native_for_float32_on_a_cpu_and_says_why_it_cannot_elsewhere() -> None:
    grid, nothing = BlockGrid(height=4, width=4, block=8, radius=4), torch.zeros(1)
    if why_not() is None:
        assert plan_attention(grid, "auto", nothing, nothing, torch.float32).backend == "native"
        with torch.autocast("cpu", torch.bfloat16):
            assert plan_attention(grid, "auto", nothing, nothing, torch.float32).backend == "dense"
    with pytest.raises(ConfigError, match="'native' cannot run here: its kernels are for float32"):
        plan_attention(grid, "native", nothing, nothing, torch.bfloat16)
    meta = torch.zeros(1, device="meta")
    with pytest.raises(ConfigError, match="for CPUs"):
        plan_attention(grid, "native", meta, meta, torch.float32)


def test_auto_chooses_by_size_and_dense_refuses_to_round() -> None:
    nothing = torch.zeros(1)

    def chosen(height: int, width: int) -> str:
        grid = BlockGrid(height=height, width=width, block=8, radius=4)
        return plan_attention(grid, "auto", nothing, nothing, torch.bfloat16).backend

    assert chosen(8, 8) == "dense" and chosen(1, 32) == "dense"
    assert chosen(1, 33) == "halo" and chosen(DENSE_TOKENS // 10 + 1, 10) == "halo"
    with pytest.raises(ConfigError, match="float32"):
        plan_attention(BlockGrid(height=33, width=2, block=8, radius=4), "dense", nothing, nothing, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(dtype: torch.dtype) -> None:
    case = Case.draw(BlockGrid(height=13, width=18, block=8, radius=4, shift=4), hidden=1)
    exact = case.written_out()
    names = ("query", "key", "value", "text_key", "text_value")
    halved = Case(**{**vars(case), **{name: getattr(case, name).to(dtype) for name in names}})
    # `Case.run` lays the altitude and the far mark beside the text's content, which must fit the dtype too.
    altitude = torch.where(case.text_mask[:, None], case.altitude[None, :, None], -FAR).to(dtype)
    geometry = torch.zeros(*case.text_key.shape[:3], GEOMETRY_DIM, dtype=dtype)
    geometry[..., 4] = geometry[..., 5] = altitude
    text = TextKeyValue(torch.cat([halved.text_key, geometry], dim=-1), halved.text_value)
    for backend in ("dense", "halo"):
        plan = plan_attention(case.grid, backend, torch.zeros(1), torch.zeros(1), dtype)
        output = BACKENDS[backend](
            halved.query, halved.key, halved.value, text, Transport(case.drift, case.sigma), plan
        )
        assert output.dtype == dtype and (output.float() - exact).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("side", [24, 64], ids=["dense", "halo"])
def test_compiled_blocks_have_the_same_gradients(build, prompt_of, side: int) -> None:
    """Compiled with the rest, overlapping windows had gradients that were wrong by their own size, or crashed."""

    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model = build().train()
        prompt = prompt_of(model, 2)
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False)
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(2, 3, side, side, generator=generator)
        output = model(z, torch.tensor([0.3, 0.6]), prompt, torch.tensor([1, 1])).sample
        output.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, compiled = gradients(False), gradients(True)
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        assert (compiled[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.slow
def test_compiled_blocks_draw_the_same(build, prompt_of) -> None:
    """Without gradients the network takes other, faster roads, compiled and not."""
    model = build()
    prompt = prompt_of(model, 2)
    z = torch.randn(2, 3, 100, 104, generator=torch.Generator().manual_seed(1))
    time, level = torch.tensor([0.3, 0.6]), torch.tensor([1, 1])
    with torch.inference_mode():
        eager = model(z, time, prompt, level).sample
        for block in model.blocks:
            block.compile(dynamic=False)
        compiled = model(z, time, prompt, level).sample
    assert eager.std() > 0.01
    assert (compiled - eager).abs().max() <= 1e-4 * eager.abs().max()
