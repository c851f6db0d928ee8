"""Muon for the matrices inside blocks, AdamW for everything else, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from physformer_core.errors import ConfigError
from physformer_core.hardware import has_fast_bfloat16
from physformer_core.model.native import ops as native
from physformer_core.training.distributed import divided_like, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic whose iteration drives singular values to about 1 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

NEWTON_SCHULZ_STEPS = 5


def muon_dtype(device: torch.device) -> torch.dtype:
    """The arithmetic of Muon's iterations: bfloat16 where the device has it in hardware, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def iterates_on_gram(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether torch orthogonalises matrices of this shape by way of their products with themselves: from a ratio of 1.5
    on that takes fewer operations. Not in bfloat16, in which squares of small singular values would drown. The kernel
    in C always does."""
    return 2 * max(rows, columns) > 3 * min(rows, columns) and dtype != torch.bfloat16


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearest (semi-)orthogonal matrices, to within the Newton-Schulz quintic's accuracy.

    An iteration is X <- P X with a polynomial P of X X^T, and all those commute: so what is iterated may be X X^T,
    which is small, and X is multiplied once.

    Args:
        matrices: [K, m, n]; they are independent, and batched for speed.
        steps: Iterations.
        dtype: Arithmetic: bfloat16 where it is fast, else float32.
    """
    if dtype == torch.float32 and native.takes(matrices):
        return native.orthogonalize(matrices, steps, NEWTON_SCHULZ)
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    rows, columns = x.shape[-2:]
    if iterates_on_gram(rows, columns, dtype):
        gram, product = x @ x.transpose(-1, -2), None
        for step in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            if step < steps - 1:
                gram = factor @ (factor @ gram)
        x = x if product is None else product @ x
    else:
        for _ in range(steps):
            gram = x @ x.transpose(-1, -2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(-1, -2) if transposed else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is orthogonalised before it is applied.

    Unlike ``torch.optim.Muon`` it batches matrices of one shape and computes in the dtype that the device is fast
    in (there, bfloat16 always, which on a CPU without it costs four times as much). The step is scaled by
    ``0.2 sqrt(max(m, n))`` so that its size matches AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982).

    Of matrices that are divided over ranks (FSDP2), every rank gathers the momentum, orthogonalises the whole, and
    keeps its part: the result is that of one process, to rounding.

    Args:
        params: Matrices, and kernels of convolutions, which are matrices from patches to channels.
        lr: Learning rate, on AdamW's scale.
        momentum: Nesterov momentum.
        weight_decay: Decoupled.
        steps: Newton-Schulz iterations.
        dtype: Arithmetic of the iterations.

    Attributes:
        found_inf: As torch's fused optimizers have it: a number on the device, 1 if the next step is to change nothing
            whatever the gradients hold; None if they are known to be finite.
    """

    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = NEWTON_SCHULZ_STEPS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.newton_schulz_steps, self.newton_schulz_dtype = steps, dtype
        self.found_inf = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Applies one update."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                grads = [cast(Tensor, param.grad) for param in params]
                for param in params:
                    if "momentum_buffer" not in self.state[param]:
                        self.state[param]["momentum_buffer"] = torch.zeros_like(param)
                buffers = [self.state[param]["momentum_buffer"] for param in params]
                keep = 1 - group["lr"] * group["weight_decay"]
                rate = -group["lr"] * 0.2 * math.sqrt(max(shape[0], shape[1:].numel()))
                if self.found_inf is None and self._takes_kernel([*params, *grads, *buffers]):
                    iteration = (self.newton_schulz_steps, NEWTON_SCHULZ)
                    native.muon_step(params, grads, buffers, *iteration, group["momentum"], keep=keep, rate=rate)
                    continue
                if self.found_inf is not None:
                    spoilt = self.found_inf > 0
                    grads = [torch.where(spoilt, own, grad) for own, grad in zip(buffers, grads, strict=True)]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, buffers, group["momentum"])
                # What is orthogonal is the whole matrix: a rank that holds some of its rows needs the others'.
                matrices = torch.stack([whole(update).flatten(1) for update in updates])
                directions = orthogonalize(matrices, self.newton_schulz_steps, self.newton_schulz_dtype)
                directions = directions.unflatten(2, shape[1:])
                parts = [divided_like(one, param) for one, param in zip(directions, params, strict=True)]
                if self.found_inf is None:
                    if group["weight_decay"]:
                        torch._foreach_mul_(params, keep)
                    torch._foreach_add_(params, parts, alpha=rate)
                else:
                    applied = 1 - self.found_inf
                    torch._foreach_mul_(params, 1 - (1 - keep) * applied)
                    torch._foreach_mul_(parts, rate * applied)
                    torch._foreach_add_(params, parts)

    def _takes_kernel(self, tensors: list[Tensor]) -> bool:
        """Whether the kernel in C can take these: float32 on a CPU, whole, and in order in memory."""
        plain = self.newton_schulz_dtype == torch.float32 and native.takes(*tensors)
        return plain and all(tensor.is_contiguous() for tensor in tensors)


_NOT_MATRICES = ("modulation", "logit", "lora_", "refiner.enter", "refiner.leave")
"""Parts of names within blocks that Muon leaves alone."""


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Named parameters for Muon (matrices within blocks, but not modulation) and for AdamW (the rest).

    The refiner counts as a block but for its first and last convolution. Frozen ones are left out. The two thin factors
    of an adapter go to AdamW: their product is what acts, and orthogonal factors would make every direction of it
    equally large.
    """
    muon, adamw = {}, {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        in_block = name.removeprefix("base.").startswith(("blocks.", "text_blocks.", "refiner."))
        if in_block and param.ndim in (2, 4) and not any(part in name for part in _NOT_MATRICES):
            muon[name] = param
        else:
            adamw[name] = param
    return muon, adamw


class Optimizer:
    """The one or two optimizers of a run, stepped, scheduled and saved together.

    Args:
        model: Whose parameters are trained.
        name: ``muon`` (Muon and AdamW) or ``adamw``.
        lr: AdamW's peak learning rate.
        muon_lr: Muon's peak learning rate.
        weight_decay: Decoupled, on matrices and kernels.
        betas: AdamW's.
        muon_dtype: Arithmetic of Muon's iterations.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        lr: float,
        muon_lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        muon_dtype: torch.dtype,
    ) -> None:
        if name not in ("muon", "adamw"):
            raise ConfigError(f"unknown optimizer '{name}'", hint="'muon' or 'adamw'")
        muon, adamw = split_parameters(model)
        if name == "adamw":
            muon, adamw = {}, {**adamw, **muon}
        matrices = [p for p in adamw.values() if p.ndim >= 2]
        others = [p for p in adamw.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.names: dict[Tensor, str] = {param: key for key, param in model.named_parameters()}
        # In one pass over memory, and on CUDA in a few kernels. Elsewhere torch chooses.
        fused = all(param.device.type in ("cpu", "cuda") for param in adamw.values()) or None
        groups = [group for group in groups if group["params"]]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-10, fused=fused), lr)
        ]
        if muon:
            part = Muon(muon.values(), lr=muon_lr, weight_decay=weight_decay, dtype=muon_dtype)
            self.parts.append((part, muon_lr))

    def step(self, factor: float, found_inf: Tensor | None = None) -> None:
        """One update at ``factor`` of the peak learning rates.

        ``found_inf`` is a number on the device: if it is 1, the update changes nothing. It needs AdamW's fused form.
        """
        for part, peak in self.parts:
            for group in part.param_groups:
                group["lr"] = peak * factor
            part.found_inf = found_inf  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self) -> None:
        for part, _ in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as flat named tensors, for safetensors; parts that ranks hold stay parts."""
        return {
            f"{self.names[param]}|{key}": value if isinstance(value, Tensor) else torch.tensor(float(value))
            for part, _ in self.parts
            for param, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Restores what `state_tensors` gave, name by name; every rank must be given whole tensors."""
        places = {
            self.names[param]: (part, param)
            for part, _ in self.parts
            for group in part.param_groups
            for param in group["params"]
        }
        for part, _ in self.parts:
            part.state.clear()
        for key, value in tensors:
            name, _, field = key.partition("|")
            part, param = places[name]
            # AdamW keeps its step count on the CPU, but for the fused form, which has it where the parameter is.
            fused = any(group.get("fused") for group in part.param_groups)
            count = value.to(param.device if fused else "cpu") if field == "step" else None
            part.state[param][field] = (divided_like(value, param) if count is None else count).clone()


def schedule(step: int, total: int, *, warmup_fraction: float, start: float = 0.1, end: float = 0.1) -> float:
    """Factor of the peak learning rate: linear from ``start``, then a cosine to ``end``."""
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return start + (1 - start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
