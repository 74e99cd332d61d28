r"""Jets: truncated Taylor arithmetic through ordinary torch modules :cite:p:`Griewank2008`.

A jet holds the Taylor coefficients of ``t -> f(x + t v_d)`` for D directions at once. When a torch op is called with a jet,
its Taylor rule is looked up in :data:`RULES`, so a layer that was written for tensors also works on jets, unchanged. The
rules themselves are defined in :mod:`neurst.core.rules`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RULES: dict[Callable, Callable] = {}  # torch op -> its Taylor rule


def rule(*ops: Callable) -> Callable:
    """Register the decorated function as the Taylor rule of `ops`."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def operators(op: Callable) -> tuple[Callable, Callable]:
    """The methods behind ``jet * other`` and ``other * jet``."""
    return lambda jet, other: op(jet, other), lambda jet, other: op(other, jet)


@dataclass(frozen=True, eq=False)
class Jet:
    r"""Taylor coefficients of ``t -> f(x + t v_d)`` at N points along D directions, up to order K.

    ``f(x + t v_d) = value + sum_k terms[k-1, d] t^k + O(t^(K+1))``

    Parameters
    ----------
    value
        (N, C), shared by all directions.
    terms
        (K, D, N, C) coefficients, *without* the factorial: see :meth:`derivative`.
    """

    value: Tensor
    terms: Tensor

    @property
    def order(self) -> int:
        """K, the highest coefficient kept."""
        return len(self.terms)

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        return self.value.shape

    @property
    def coefs(self) -> list[Tensor]:
        """Coefficients 0 .. K: the value (N, C), then K tensors (D, N, C)."""
        return [self.value, *self.terms.unbind(0)]

    def derivative(self, k: int) -> Tensor:  # -> (D, N, C)
        """k-th derivative along each direction, ``k! terms[k-1]``."""
        return self.terms[k - 1] if k == 1 else math.factorial(k) * self.terms[k - 1]

    def to(self, like: Tensor) -> Jet:
        """The jet in the type and on the device of a tensor."""
        return Jet(self.value.to(like), self.terms.to(like))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in RULES:
            msg = (
                f"no Taylor rule for `{getattr(func, '__name__', func)}`: write the layer with the ops in "
                "neurst.core.jet.RULES, or add a rule with `@neurst.core.jet.rule(op)`"
            )
            raise TypeError(msg)
        return RULES[func](*args, **(kwargs or {}))

    __add__, __radd__ = operators(torch.add)
    __sub__, __rsub__ = operators(torch.sub)
    __mul__, __rmul__ = operators(torch.mul)
    __truediv__, __rtruediv__ = operators(torch.div)
    __pow__, _ = operators(torch.pow)

    def __neg__(self):
        return torch.neg(self)

    def __getitem__(self, index):
        # the leading axis is that of points in the value and of orders in the terms, so it cannot be indexed
        if not (isinstance(index, tuple) and index and index[0] is Ellipsis):
            msg = f"a jet is indexed as jet[..., channels], not with {index!r}: select points before seeding"
            raise TypeError(msg)
        return Jet(self.value[index], self.terms[index])


Function = Callable[[Tensor | Jet], Tensor | Jet]


def seed(x: Tensor, directions: Tensor | None = None, order: int = 1) -> Jet:
    """The jet of the identity function at `x`. A function called with this jet returns the jet of the function at `x`.

    Parameters
    ----------
    x
        (N, d) points.
    directions
        (D, d), or (D, N, d) if they differ from point to point; the d coordinate axes if None.
    order
        K >= 1, the highest order of the derivatives.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.5, 2.0]])
    >>> torch.sin(seed(x, order=2)).derivative(2)[0, 0, 0]  # second derivative of sin(x_1) along axis 0
    tensor(-0.4794)
    """
    if x.ndim != 2 or order < 1:
        msg = f"`x` has shape {tuple(x.shape)} and `order` is {order}: expected (N, d) and order >= 1"
        raise ValueError(msg)
    if directions is None:
        directions = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if directions.ndim == 2:
        directions = directions[:, None, :]
    first = directions.expand(len(directions), *x.shape)
    return Jet(x, torch.stack([first] + [torch.zeros_like(first)] * (order - 1)))


def derivative(f: Function, x: Tensor, directions: Tensor, order: int) -> Tensor:  # -> (D, N, C)
    """`order`-th derivative of `f` along each direction, (D, d) or (D, N, d)."""
    return f(seed(x, directions, order)).derivative(order)


def jacobian(f: Function, x: Tensor) -> Tensor:  # -> (N, C, d)
    """All first derivatives, in one forward pass for all channels."""
    return f(seed(x)).derivative(1).permute(1, 2, 0)


def pair_directions(d: int, like: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """Directions whose second derivatives determine a Hessian: the d axes, then ``e_i + e_j`` for the pairs i < j."""
    eye = torch.eye(d, dtype=like.dtype, device=like.device)
    pairs = list(itertools.combinations(range(d), 2))
    return torch.cat([eye, *[(eye[i] + eye[j])[None] for i, j in pairs]]), pairs


def polarise(second: Tensor, pairs: list[tuple[int, int]]) -> Tensor:  # (D, N, C) -> (pairs, N, C)
    """Mixed second derivatives, computed from those along `pair_directions`: ``2 D_i D_j = D_(i+j)^2 - D_i^2 - D_j^2``."""
    d = len(second) - len(pairs)
    left, right = [i for i, _ in pairs], [j for _, j in pairs]
    return (second[d:] - second[left] - second[right]) / 2


def hessian(f: Function, x: Tensor) -> Tensor:  # -> (N, C, d, d)
    """All second derivatives, by polarisation of second directional derivatives."""
    d = x.shape[1]
    directions, pairs = pair_directions(d, x)
    second = derivative(f, x, directions, 2)
    out = torch.diag_embed(second[:d].permute(1, 2, 0))
    for (i, j), h in zip(pairs, polarise(second, pairs), strict=True):
        out[..., i, j] = out[..., j, i] = h
    return out


def laplacian(f: Function, x: Tensor) -> Tensor:  # -> (N, C)
    """Sum of the second derivatives along the axes."""
    return f(seed(x, order=2)).derivative(2).sum(0)


def mixed(f: Function, x: Tensor, *vectors: Tensor) -> Tensor:  # -> (N, C)
    r"""Mixed derivative ``D_{v1} ... D_{vk} f`` along k vectors of shape (d,), for any k.

    Polarisation: ``1 / (2^(k-1) k!) * sum over signs s with s_1 = 1 of (prod s) D^k_{sum_i s_i v_i} f``.
    """
    k = len(vectors)
    signs = torch.tensor([(1, *s) for s in itertools.product((1, -1), repeat=k - 1)], dtype=x.dtype, device=x.device)
    d_k = derivative(f, x, signs @ torch.stack(vectors), k)
    return torch.einsum("s,snc->nc", signs.prod(1), d_k) / (2 ** (k - 1) * math.factorial(k))
