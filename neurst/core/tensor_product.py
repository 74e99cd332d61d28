r"""Networks that are tensor products of functions of one coordinate, and how they are evaluated on a lattice.

A function :math:`f(x) = \mathrm{core} \times_1 U_1(x_1) \cdots \times_d U_d(x_d)` (a Tucker product) is evaluated on a whole lattice
by d small matrix products, one factor for each axis, instead of once for each node. Its partial derivative :math:`D^\alpha f` takes the
:math:`\alpha_i`-th derivative of each factor, which comes from a jet of one coordinate. Other networks are evaluated node by node.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core.jet import Jet, seed
from neurst.core.lattice import Lattice
from neurst.core.table import MultiIndex, multi_indices, partials


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A factor (n, r) with few entries in each row: ``U[i, index[i, k]] = weight[i, k]``."""

    index: Tensor  # (n, k)
    weight: Tensor  # (n, k)

    def __matmul__(self, right: Tensor) -> Tensor:  # (r, m) -> (n, m)
        return F.embedding_bag(self.index, right, per_sample_weights=self.weight, mode="sum")


class TensorProduct(nn.Module, ABC):
    """A module (N, d) -> (N, C) that is one Tucker product."""

    @abstractmethod
    def core_tensor(self) -> Tensor:  # -> (r_1, ..., r_d, C)
        """The core tensor."""

    @abstractmethod
    def factor_along(self, axis: int, t: Tensor, order: int) -> list[Tensor | SparseRows]:
        """The factor of an axis at coordinates `t` (n, 1) and its derivatives up to `order`, as ``order + 1`` matrices (n, r)."""


class TensorProductSum(nn.Module):
    """The sum of several Tucker products and a constant: (N, d) -> (N, C)."""

    def __init__(self, terms: list[TensorProduct], n_out: int):
        super().__init__()
        self.terms, self.bias = nn.ModuleList(terms), nn.Parameter(torch.zeros(n_out, dtype=torch.float32))

    def forward(self, x):
        return sum((term(x) for term in self.terms), start=self.bias)


def derivatives_along(function: Callable, t: Tensor, order: int) -> list[Tensor]:  # (n, 1) -> order + 1 times (n, r)
    """Values and derivatives of a function of one coordinate."""
    if order == 0:
        return [function(t)]
    jet = function(seed(t, order=order))
    return [jet.value, *(jet.derivative(k)[0] for k in range(1, order + 1))]


def _terms(net: Callable) -> tuple[list[TensorProduct], Tensor | None] | None:
    """The Tucker products whose sum is the network, and its constant; None for any other network."""
    if isinstance(net, TensorProduct):
        return [net], None
    return (list(net.terms), net.bias) if isinstance(net, TensorProductSum) else None


def _contract(core: Tensor, factor: Tensor | SparseRows, axis: int) -> Tensor:  # (.., r, .., C) -> (.., n, .., C)
    front = core.movedim(axis, 0)
    return (factor @ front.flatten(1)).unflatten(1, front.shape[1:]).movedim(0, axis)


def _term_partials(term: TensorProduct, lattice: Lattice, orders: list[MultiIndex]) -> dict[MultiIndex, Tensor]:
    """``D^alpha`` of one Tucker product. Orders with the same leading indices share the products of the leading axes."""
    highest = [max(alpha[i] for alpha in orders) for i in range(lattice.ndim)]
    partial: dict[MultiIndex, Tensor] = {(): term.core_tensor()}
    for i, axis in enumerate(lattice.axes):
        factors = term.factor_along(i, axis[:, None], highest[i])
        leading = {alpha[: i + 1] for alpha in orders}
        partial = {alpha: _contract(partial[alpha[:-1]], factors[alpha[-1]], i) for alpha in sorted(leading)}
    return partial


def lattice_partials(net: Callable, lattice: Lattice, orders: Iterable[MultiIndex]) -> dict[MultiIndex, Tensor]:
    r"""Partial derivatives :math:`D^\alpha f` of a network on a lattice.

    Parameters
    ----------
    net
        A network of :mod:`neurst.core.nets`, or any function of tensors and jets.
    lattice
        Nodes in box units.
    orders
        The multi-indices :math:`\alpha`, d whole numbers each.

    Returns
    -------
    dict
        A tensor (N, C) for each multi-index, with the nodes in row-major order.
    """
    orders = list(orders)
    parts = _terms(net)
    if parts is None:
        values, alphas = partials(net, lattice.points(), max(map(sum, orders)))
        return {alpha: values[..., alphas.index(alpha)] for alpha in orders}
    terms, bias = parts
    each = [_term_partials(term, lattice, orders) for term in terms]
    out = {alpha: sum(part[alpha] for part in each).flatten(0, -2) for alpha in orders}
    return {alpha: f + bias if bias is not None and not any(alpha) else f for alpha, f in out.items()}


def value_at(net: Callable, x: Tensor | Lattice) -> Tensor:  # -> (N, C)
    """The value of a network at points (N, d) or on a lattice."""
    if isinstance(x, Tensor):
        return net(x)
    zero = (0,) * x.ndim
    return lattice_partials(net, x, [zero])[zero]


def jet_at(net: Callable, x: Tensor | Lattice, directions: Tensor | None, order: int) -> Jet:
    r"""The jet of a network at points or on a lattice along directions (D, d) or (D, N, d), the axes if None.

    On a lattice, coefficient k is :math:`\sum_{|\alpha| = k} \tfrac{v^\alpha}{\alpha!} D^\alpha f`.
    """
    if isinstance(x, Tensor) or _terms(net) is None:
        return net(seed(x if isinstance(x, Tensor) else x.points(), directions, order))
    if directions is None:
        directions = torch.eye(x.ndim, dtype=x.axes[0].dtype, device=x.axes[0].device)
    v = directions if directions.ndim == 3 else directions[:, None]  # (D, N or 1, d)
    varies = v.shape[1] > 1
    zero, *all_orders = multi_indices(x.ndim, order)
    used = [alpha for alpha in all_orders if varies or bool(_monomial(v, alpha).any())]
    found = lattice_partials(net, x, [zero, *used])
    terms = []
    for k in range(1, order + 1):
        parts = [_monomial(v, alpha)[..., None] * found[alpha] for alpha in used if sum(alpha) == k]
        terms.append(sum(parts[1:], start=parts[0]))
    return Jet(found[zero], torch.stack(terms))


def _monomial(v: Tensor, alpha: MultiIndex) -> Tensor:  # (D, N, d) -> (D, N)
    r""":math:`v^\alpha / \alpha!`."""
    powers = [v[..., i] ** a / math.factorial(a) for i, a in enumerate(alpha) if a]
    return math.prod(powers[1:], start=powers[0])
