r"""All partial derivatives of a function at points, mixed ones included, and arithmetic with them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.arguments import shown, whole
from neurst.core.jet import Function, Jet, operators, seed

MultiIndex = tuple[int, ...]  # alpha: how often a function is differentiated along each axis
ORDER = whole(0, 16)  # order of partial derivatives; higher orders are mostly rounding errors
MOST_CANDIDATES = 20_000  # directions that are looked at for partial derivatives


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
    found = table(f, x, order)
    return found.derivatives().movedim(0, -1), found.indices


def table(f: Function, x: Tensor, order: int) -> Table:
    """All Taylor coefficients of a function up to an order, in one forward pass.

    Parameters
    ----------
    f, x, order
        As for :func:`partials`.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    >>> found = table(lambda u: u[..., :1] * u[..., :1] * u[..., 1:], x, order=2)  # f(x, y) = x^2 y
    >>> [round(float(v), 6) for v in found.coefs[:, 0, 0]]  # f, f_x, f_y, f_xx / 2, f_xy, f_yy / 2
    [12.0, 12.0, 4.0, 3.0, 4.0, 0.0]
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
        return Table(f(x)[None], d)
    return Table.of_jet(f(seed(x, _spread_directions(d, order).to(x), order)), d)


@dataclass(frozen=True, eq=False)
class Table:
    r"""All Taylor coefficients of a function of d variables at N points, up to an order K: :math:`T_\alpha = D^\alpha f / \alpha!`.

    A torch op with a Taylor rule takes a table and gives the table of the result, exactly to the same order. So a layer that was written for tensors acts on tables, and the result can be differentiated again.

    Parameters
    ----------
    coefs
        (M, N, C), in the order of :func:`multi_indices`.
    n_dims
        d.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    >>> squared = table(lambda u: u[..., :1] + u[..., 1:], x, order=3) ** 2  # (x + y)^2
    >>> squared.derivative((1, 0)).value  # 2 (x + y)
    tensor([[5.]], dtype=torch.float64)
    """

    coefs: Tensor
    n_dims: int

    @functools.cached_property
    def order(self) -> int:
        """K."""
        return next(k for k in itertools.count() if math.comb(k + self.n_dims, k) == len(self.coefs))

    @property
    def indices(self) -> list[MultiIndex]:
        """The multi-indices of the coefficients."""
        return multi_indices(self.n_dims, self.order)

    @property
    def value(self) -> Tensor:  # (N, C)
        """The function itself."""
        return self.coefs[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        return self.coefs.shape[1:]

    def derivatives(self) -> Tensor:  # (M, N, C)
        r"""All partial derivatives, :math:`\alpha!\, T_\alpha`."""
        return self.coefs * self.coefs.new_tensor([_factorial(alpha) for alpha in self.indices])[:, None, None]

    def derivative(self, alpha: MultiIndex) -> Table:
        r"""The table of a partial derivative, :math:`T'_\beta = T_{\beta + \alpha} (\beta + \alpha)! / \beta!`, of the order K - :math:`|\alpha|`.

        Raises
        ------
        ValueError
            If the order of the derivative is above K.
        """
        if len(alpha) != self.n_dims or not 0 <= sum(alpha) <= self.order:
            msg = f"`alpha={alpha}`: expected {self.n_dims} whole numbers with a sum of at most {self.order}, the order of the table"
            raise ValueError(msg)
        place = {index: k for k, index in enumerate(self.indices)}
        lower = multi_indices(self.n_dims, self.order - sum(alpha))
        upper = [tuple(map(sum, zip(beta, alpha, strict=True))) for beta in lower]
        factor = [_factorial(high) // _factorial(low) for high, low in zip(upper, lower, strict=True)]
        rows = [place[index] for index in upper]
        return Table(self.coefs[rows] * self.coefs.new_tensor(factor)[:, None, None], self.n_dims)

    def scaled(self, unit: float) -> Table:
        """The table in coordinates whose unit is `unit` times as long: each coefficient times ``unit ** |alpha|``."""
        factor = self.coefs.new_tensor([float(unit) ** sum(alpha) for alpha in self.indices])
        return Table(self.coefs * factor[:, None, None], self.n_dims)

    def truncated(self, order: int) -> Table:
        """The table up to a lower order."""
        return Table(self.coefs[: math.comb(order + self.n_dims, order)], self.n_dims)

    def jet(self) -> Jet:
        """The jet along directions that determine the table."""
        terms, start = [], 1
        for k, (forward, _) in enumerate(_conversions(self.n_dims, self.order), 1):
            count = math.comb(k + self.n_dims - 1, k)
            terms.append(torch.einsum("dm,mnc->dnc", forward.to(self.coefs), self.coefs[start : start + count]))
            start += count
        return Jet(self.value, torch.stack(terms))

    @classmethod
    def of_jet(cls, jet: Jet, n_dims: int) -> Table:
        """The table that a jet along these directions has."""
        parts = [jet.value[None]]
        for (_, backward), term in zip(_conversions(n_dims, jet.order), jet.terms, strict=True):
            parts.append(torch.einsum("md,dnc->mnc", backward.to(term), term))
        return cls(torch.cat(parts), n_dims)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        tables = [each for each in _flat(args) if isinstance(each, Table)]
        d, order = tables[0].n_dims, min(each.order for each in tables)
        if any(each.n_dims != d for each in tables):
            msg = f"tables of {sorted({each.n_dims for each in tables})} variables cannot be combined: expected the same number"
            raise ValueError(msg)
        lower = lambda each: each.truncated(order).jet() if order else each.value
        found = func(*_mapped(args, lower), **(kwargs or {}))
        if isinstance(found, Jet):
            return cls.of_jet(found, d)
        return found if order else cls(found[None], d)

    __add__, __radd__ = operators(torch.add)
    __sub__, __rsub__ = operators(torch.sub)
    __mul__, __rmul__ = operators(torch.mul)
    __truediv__, __rtruediv__ = operators(torch.div)
    __pow__, _ = operators(torch.pow)

    def __neg__(self):
        return torch.neg(self)

    def __getitem__(self, index):
        if not (isinstance(index, tuple) and index and index[0] is Ellipsis):
            msg = f"a table is indexed as table[..., channels], not with {index!r}"
            raise TypeError(msg)
        return Table(self.coefs[index], self.n_dims)


def _flat(args: tuple) -> Iterator:
    """Arguments of an op, those in lists included."""
    for each in args:
        yield from each if isinstance(each, (list, tuple)) else (each,)


def _mapped(args: tuple, function: Callable[[Table], Jet | Tensor]) -> tuple:
    """Arguments of an op with all tables replaced."""
    one = lambda each: function(each) if isinstance(each, Table) else each
    return tuple([one(part) for part in each] if isinstance(each, (list, tuple)) else one(each) for each in args)


def _factorial(alpha: MultiIndex) -> int:
    return math.prod(map(math.factorial, alpha))


@functools.cache
def _conversions(d: int, order: int) -> list[tuple[Tensor, Tensor]]:
    """For each order k >= 1, the matrix from Taylor coefficients of sum k to jet terms (D, M_k), and its pseudo-inverse; float64."""
    out = []
    for k in range(1, order + 1):
        scale = torch.tensor([_factorial(alpha) / math.factorial(k) for alpha in _of_order(d, k)], dtype=torch.float64)
        forward = _monomials(_spread_directions(d, order), k) * scale
        out.append((forward, torch.linalg.pinv(forward)))
    return out


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
