r"""Jets: truncated Taylor arithmetic through ordinary torch modules :cite:p:`Griewank2008`.

A jet holds the Taylor coefficients of ``t -> f(x + t v_d)`` for D directions at once. When a torch op is called with a jet,
its Taylor rule is looked up in :data:`RULES`, so a layer that was written for tensors also works on jets, unchanged. The
rules themselves are defined in :mod:`neurst.core.rules`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.arguments import shown, whole

MultiIndex = tuple[int, ...]  # alpha: how often a function is differentiated along each axis
ORDER = whole(0, 16)  # order of partial derivatives; higher orders are mostly rounding errors
MOST_CANDIDATES = 20_000  # directions that are looked at for partial derivatives
RULES: dict[Callable, Callable] = {}  # torch op -> its Taylor rule


def rule(*ops: Callable) -> Callable:
    """Register the decorated function as the Taylor rule of `ops`."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def _operators(op: Callable) -> tuple[Callable, Callable]:
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

    __add__, __radd__ = _operators(torch.add)
    __sub__, __rsub__ = _operators(torch.sub)
    __mul__, __rmul__ = _operators(torch.mul)
    __truediv__, __rtruediv__ = _operators(torch.div)
    __pow__, _ = _operators(torch.pow)

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


def multi_indices(d: int, order: int) -> list[MultiIndex]:
    """All multi-indices of d axes with sum at most `order`, sorted by sum and then with the leading axes first.

    Examples
    --------
    >>> multi_indices(2, 2)
    [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    """
    return [alpha for k in range(order + 1) for alpha in _of_order(d, k)]


def partials(f: Function, x: Tensor, order: int) -> tuple[Tensor, list[MultiIndex]]:
    r"""All distinct partial derivatives :math:`D^\alpha f` up to an order, mixed ones included, in one forward pass.

    The jet along D directions gives :math:`D_v^k f = \sum_{|\alpha| = k} \tfrac{k!}{\alpha!} v^\alpha D^\alpha f`, which is solved for
    the partial derivatives of each order k. D is the number of partial derivatives of the highest order.

    Parameters
    ----------
    f
        Function (N, d) -> (N, C) that uses only ops with a Taylor rule.
    x
        (N, d) points.
    order
        Highest order K, 0 to 16. Rounding grows with the order: above 4, pass float64.

    Returns
    -------
    The derivatives (N, C, M), and their M multi-indices in the order of :func:`multi_indices`; the first is the value.

    Raises
    ------
    TypeError, ValueError
        If `x` is not a floating-point tensor (N, d), `order` is out of range, or `f` uses an op without a Taylor rule.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    >>> values, alphas = partials(lambda u: u[..., :1] * u[..., :1] * u[..., 1:], x, order=2)  # f(x, y) = x^2 y
    >>> {alpha: round(float(v), 6) for alpha, v in zip(alphas, values[0, 0])}
    {(0, 0): 12.0, (1, 0): 12.0, (0, 1): 4.0, (2, 0): 6.0, (1, 1): 4.0, (0, 2): 0.0}
    """
    order = ORDER("order", order)
    if not callable(f):
        msg = f"`f={shown(f)}`: expected a function of points (N, d)"
        raise TypeError(msg)
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        msg = f"`x={shown(x)}`: expected a floating-point tensor (N, d), one row for each point"
        raise TypeError(msg)
    d = x.shape[1]
    if order == 0:
        return f(x)[..., None], multi_indices(d, 0)
    directions = _spread_directions(d, order).to(x)
    jet = f(seed(x, directions, order))
    found = [jet.value[..., None]]
    for k in range(1, order + 1):
        solve = torch.linalg.pinv(_monomials(directions.double(), k)).to(jet.value)  # (M_k, D)
        found.append(torch.einsum("md,dnc->ncm", solve, jet.derivative(k)))
    return torch.cat(found, -1), multi_indices(d, order)


def _of_order(d: int, k: int) -> list[MultiIndex]:
    picks = itertools.combinations_with_replacement(range(d), k)
    return [tuple(pick.count(axis) for axis in range(d)) for pick in picks]


def _monomials(v: Tensor, k: int) -> Tensor:  # (D, d) -> (D, M_k)
    r""":math:`\tfrac{k!}{\alpha!} v^\alpha` for the multi-indices of sum k."""
    columns = [
        math.factorial(k) / math.prod(map(math.factorial, alpha)) * (v ** torch.tensor(alpha).to(v)).prod(-1)
        for alpha in _of_order(v.shape[1], k)
    ]
    return torch.stack(columns, -1)


@functools.cache
def _spread_directions(d: int, k: int) -> Tensor:  # -> (D, d) float64
    """As many unit vectors as there are partial derivatives of order k, spread so that they determine these well.

    Greedy choice from a lattice of candidates: each step takes the candidate that depends least on those already chosen
    (pivoted Gram-Schmidt).
    """
    radius = min(k, 3 if k < 8 else 4)  # large enough that there are more candidates than derivatives
    if (2 * radius + 1) ** d > MOST_CANDIDATES:  # the multi-indices themselves are enough, if not spread as well
        half = _of_order(d, k)
    else:
        lattice = itertools.product(range(radius, -radius - 1, -1), repeat=d)
        half = [v for v in lattice if any(v) and next(a for a in v if a) > 0]  # -v gives no more information than v
    candidates = torch.nn.functional.normalize(torch.tensor(half, dtype=torch.float64), dim=1).unique(dim=0)
    rest, chosen = _monomials(candidates, k), []
    for _ in range(rest.shape[1]):
        chosen.append(int(rest.norm(dim=1).argmax()))
        unit = torch.nn.functional.normalize(rest[chosen[-1]], dim=0)
        rest = rest - (rest @ unit)[:, None] * unit
    return candidates[chosen]
