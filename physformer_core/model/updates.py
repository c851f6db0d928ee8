"""How a sublayer's output changes a token: updates, what each conserves, and the registry that names them.

Throughout, h is a token (float32), f the gated output of a sublayer, ``<.,.>`` a sum over features. The *energy* of a
token is ``|h|^2``. Every update returns h, to the bit, where f is zero: a block whose gates are closed is the identity
(AdaLN-Zero), whatever the form. Every update but ``plain`` is smooth in h and f with bounded output, so depth alone
cannot make a token grow.

Lengths: updates compute in float32 and are accurate for ``1e-12 < |h|`` and ``|f| < 1e18``. Shorter tokens are left as
they are, which conserves them too.

To add a form, write its update here with the law it keeps, and an entry in `RESIDUALS`: the tests of laws, of the
identity and of the whole network run over the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physformer_core.errors import ConfigError

TINY = 1e-24
"""Energy below which a token has no direction that float32 could turn."""

OPPOSED = 1e-12
"""|h + f|^2 / |h|^2 below which the sum is rounding and points nowhere."""


def plain_update(hidden_states: Tensor, update: Tensor) -> Tensor:
    """``h <- h + f``: the pre-norm residual (He et al. 2016, https://arxiv.org/abs/1603.05027). Conserves nothing by
    itself: the reference of the ablation. Of one stream given the other, as in the leapfrog, it is a translation: it
    conserves volume, and its inverse is exact."""
    return hidden_states + update


def rotation_update(hidden_states: Tensor, update: Tensor) -> Tensor:
    """Turns each token towards its update without changing its norm.

    With ``w = f - <f, h> h / |h|^2`` and ``theta = |w| / |h|`` this is
    ``h <- cos(theta) h + (sin(theta) / theta) w``: the exponential map of the sphere (Absil, Mahony & Sepulchre 2008,
    Optimization Algorithms on Matrix Manifolds, 5.4), a step of length |w| along the great circle through h in the
    direction of f.

    w is made orthogonal to h twice ("twice is enough": Giraud, Langou & Rozloznik 2005,
    https://doi.org/10.1007/s00211-005-0615-4). Once leaves a part of f's rounding along h, which for updates nearly
    parallel to h and g times as long changed the norm by ``1e-7 g^2 / 2`` of itself.

    Args:
        hidden_states: [..., D] float32 tokens h.
        update: [..., D] gated sublayer output f.

    Returns:
        [..., D] float32 with the norm of ``hidden_states`` to a few units of rounding, for ``|f| < 1e6 |h|`` in any
        direction; equal to it where ``update`` is zero.
    """
    return _Rotation.apply(hidden_states, update.to(hidden_states.dtype))


def renormalized_update(hidden_states: Tensor, update: Tensor) -> Tensor:
    """Adds and scales back: ``h <- |h| (h + f) / |h + f|``.

    The projective retraction of the sphere (Absil & Malick 2012, https://doi.org/10.1137/100802529); nGPT (Loshchilov
    et al. 2024, https://arxiv.org/abs/2410.01131) moves like this on the unit sphere, here each token keeps the norm it
    was born with. It agrees with `rotation_update` to first order in f. The angle is at most pi: with f orthogonal to
    h it is ``atan(|f| / |h|)``, so long updates saturate instead of winding round. Where h + f is zero to rounding, the
    direction is undefined and the token stays.

    Args:
        hidden_states: [..., D] float32 tokens h.
        update: [..., D] gated sublayer output f.

    Returns:
        [..., D] float32 with the norm of ``hidden_states`` to a few units of rounding; equal to it where ``update`` is
        zero.
    """
    return _Renormalized.apply(hidden_states, update.to(hidden_states.dtype))


def plain_inverse(updated: Tensor, update: Tensor) -> Tensor:
    """h from ``h + f`` and f."""
    return updated - update


def renormalized_inverse(updated: Tensor, update: Tensor) -> Tensor:
    """h from ``renormalized_update(h, f)`` and f, for ``|f| < |h|``; beyond, several h lead to one place.

    h lies on the ray through its image, moved back by f: ``h = t h' - f`` with t > 0 such that the norms agree, which
    is ``t^2 |h'|^2 - 2 t <h', f> + |f|^2 - |h'|^2 = 0``.
    """
    square = _square(updated).clamp_min(TINY)
    along = _dot(updated, update) / square
    root = (along.square() + 1 - _square(update) / square).clamp_min(0).sqrt()
    return torch.addcmul(-update, along + root, updated)


def _square(vectors: Tensor) -> Tensor:
    """Sum of squares over features, kept as a dimension: twice as fast as multiplying and summing."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).square()


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1, keepdim=True)


class _Rotation(torch.autograd.Function):
    """The rotation with its derivative written out: it keeps h, f and six numbers a token, where autograd would keep
    every intermediate tensor, and goes over them fewer times.

    With s = sin(theta) / theta, H = |h|^2, a = <f, h> / H and a gradient g of the result:

        k = (<g, w> (cos(theta) - s) / theta^2 - s <g, h>) / H
        df = s g + k w - s <g, h> / H h
        dh = (cos(theta) - s a) g - (k a + s <g, h> / H) w + (s <g, h> / H a - k theta^2) h
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, f: Tensor) -> Tensor:
        square = _square(h)
        still = square < TINY
        square = square.clamp_min(TINY)
        along = _dot(f, h) / square
        w = torch.addcmul(f, along, h, value=-1)
        rest = _dot(w, h) / square  # what rounding left along h; exactly, w is w - rest h
        # Divided as norms: the square of the angle might overflow. The clamp makes sin(theta) / theta 1 at zero.
        norm_w = (_square(w) - rest.square() * square).clamp_min(0).sqrt()
        theta = (norm_w * square.rsqrt()).clamp_min(1e-6)
        slope = torch.where(still, 0.0, theta.sin() / theta)
        cosine = torch.where(still, 1.0, theta.cos())
        ctx.save_for_backward(h, f, square, along, rest, theta, slope, cosine)
        return w.mul_(slope).addcmul_(cosine - slope * rest, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h, f, square, along, rest, theta, slope, cosine = ctx.saved_tensors
        w = torch.addcmul(f, along, h, value=-1)
        grad_h = _dot(grad, h)
        grad_w = _dot(grad, w) - rest * grad_h
        turn = ((cosine - slope) / theta.square() * grad_w - slope * grad_h) / square
        turn = turn.masked_fill(square <= TINY, 0)  # tokens too short to be turned
        pull = slope * grad_h / square
        into_f = torch.addcmul(torch.addcmul(slope * grad, turn, w), turn * rest + pull, h, value=-1)
        into_h = torch.addcmul((cosine - slope * along) * grad, turn * along + pull, w, value=-1)
        radial = pull * (along + rest) + turn * (along * rest - theta.square())
        return torch.addcmul(into_h, radial, h), into_f


class _Renormalized(torch.autograd.Function):
    """With s = h + f, c = |h| / |s| and a gradient g: df = c (g - <g, s> s / |s|^2), dh = df + c <g, s> h / |h|^2."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, f: Tensor) -> Tensor:
        total = h + f
        square, square_total = _square(h), _square(total)
        still = (square_total <= OPPOSED * square) | (square < TINY)
        total = torch.where(still, h, total)
        square = square.clamp_min(TINY)
        square_total = torch.where(still, square, square_total)
        # Where f is zero both squares are the same sum, and the scale is 1 to the bit.
        scale = (square / square_total).sqrt()
        ctx.save_for_backward(h, total, square, square_total, scale, still)
        return scale * total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h, total, square, square_total, scale, still = ctx.saved_tensors
        along = scale * _dot(grad, total)
        into_f = torch.addcmul(scale * grad, along / square_total, total, value=-1)
        into_h = torch.addcmul(into_f, along / square, h)
        # A token that stays does not follow f, and follows itself. The products above are finite there.
        return torch.where(still, grad, into_h), into_f.masked_fill(still, 0)


@dataclass(frozen=True)
class ResidualForm:
    """A way of applying sublayers to tokens.

    Args:
        update: ``(h, f) -> h``, over the last dimension.
        conserves: ``norm`` of every token; ``head_norms``, that of every head's slice of every token, and so the
            token's; ``volume`` of the space of states; or ``nothing``.
        streams: 1, or 2 for a leapfrog: a token is a pair (q, p), both at first its embedding, and a block does
            ``q <- update(q, attention(p)); p <- update(p, feed_forward(q))``. The mean of both is read out. What
            ``conserves`` says of norms holds of q and of p.
        inverse: ``(update(h, f), f) -> h``, where there is one in closed form.
        always_invertible: Whether ``inverse`` holds for f of any size.
    """

    update: Callable[[Tensor, Tensor], Tensor]
    conserves: Literal["norm", "head_norms", "volume", "nothing"]
    streams: Literal[1, 2] = 1
    inverse: Callable[[Tensor, Tensor], Tensor] | None = None
    always_invertible: bool = False

    def apply(self, hidden_states: Tensor, update: Tensor, heads: int) -> Tensor:
        """The update of tokens [..., D]; ``heads`` divides D."""
        if self.conserves != "head_norms":
            return self.update(hidden_states, update)
        shape = (heads, hidden_states.shape[-1] // heads)
        return self.update(hidden_states.unflatten(-1, shape), update.unflatten(-1, shape)).flatten(-2)


RESIDUALS: dict[str, ResidualForm] = {
    "rotation": ResidualForm(rotation_update, "norm"),
    # Energy cannot pass from one head's slice to another: as many laws as heads.
    "head_rotation": ResidualForm(rotation_update, "head_norms"),
    "renormalized": ResidualForm(renormalized_update, "norm", inverse=renormalized_inverse),
    # Each half step is a shear, of determinant 1: volume is conserved as by the leapfrog of mechanics, energy is not
    # (that would need sublayers that are gradients of a potential). RevNet's coupling (Gomez et al. 2017,
    # https://arxiv.org/abs/1707.04585), as in Reversible Vision Transformers (Mangalam et al. 2022,
    # https://arxiv.org/abs/2302.04869).
    "leapfrog": ResidualForm(plain_update, "volume", streams=2, inverse=plain_inverse, always_invertible=True),
    # The same coupling with half steps on spheres: |q| and |p| of every token are conserved, volume is not.
    "leapfrog_renormalized": ResidualForm(renormalized_update, "norm", streams=2, inverse=renormalized_inverse),
    "plain": ResidualForm(plain_update, "nothing"),
}
"""Forms by the name that a configuration's ``residual`` has."""


def residual_form(name: str) -> ResidualForm:
    """The form of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in RESIDUALS:
        raise ConfigError(f"unknown residual '{name}'", hint="one of " + ", ".join(RESIDUALS))
    return RESIDUALS[name]
