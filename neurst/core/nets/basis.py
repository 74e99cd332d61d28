"""Networks that are sums of fixed functions of position: B-splines, a cosine series, Gaussian bumps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core.arguments import SIZE, check_fields, number, several
from neurst.core.jet import Jet
from neurst.core.nets.base import NETWORKS, Network
from neurst.core.nets.dense import TuckerNet
from neurst.core.tensor_product import SparseRows, TensorProduct, TensorProductSum, derivatives_along

# in grid cells; rounding may place border points this far outside the box, and they still use the cubic
BORDER = 2.5e-4


def _cubic_basis(u):  # (N, 1), tensor or jet -> (N, 4)
    """The four uniform cubic B-splines over a grid cell [0, 1] :cite:p:`Unser1999`, continued linearly beyond it.

    Only points outside the box lie beyond their cell. There the cubic would grow fast.
    """
    low, high = torch.floor(u + BORDER) < 0, torch.floor(BORDER - u) < -1  # both False within [0, 1]
    outside = low | high
    if not outside.any():
        return _cubic_basis_within(u)
    edge = u * ~outside + high  # the nearest point of [0, 1]
    slopes = torch.tensor([[-0.5, 0.0, 0.5, 0.0], [0.0, -0.5, 0.0, 0.5]], dtype=torch.float32, device=low.device)
    return _cubic_basis_within(edge) + (u - edge) * (low * slopes[0] + high * slopes[1])


def _cubic_basis_within(u):  # (N, 1) in [0, 1], tensor or jet -> (N, 4)
    square = u * u
    cube = square * u
    rising = cube * (1 / 6)
    middle = u * 0.5 + square * 0.5 - cube * 0.5 + 1 / 6
    second = cube * 0.5 - square + 2 / 3
    return torch.cat([1 - (rising + middle + second), second, middle, rising], -1)


class _SplineGrid(TensorProduct):
    """Uniform cubic B-spline on the box with `cells` intervals along each axis, which need ``cells + 3`` coefficients."""

    def __init__(self, n_out: int, cells: tuple[int, ...], sides: tuple[float, ...]):
        super().__init__()
        sizes = [c + 3 for c in cells]
        self.coefficients = nn.Parameter(torch.zeros(math.prod(sizes), n_out, dtype=torch.float32))
        self.sizes = sizes
        strides = torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])
        corners = torch.tensor(list(itertools.product(range(4), repeat=len(sizes))))
        self.register_buffer("cells", torch.tensor(cells), persistent=False)
        self.register_buffer("sides", torch.tensor(sides, dtype=torch.float32), persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("corners", corners @ strides, persistent=False)

    def _locate(self, x, cells: Tensor, sides: Tensor):
        """The grid cells that coordinates lie in, and the positions within them."""
        position = (x + sides) * (cells / (2 * sides))
        # points outside the box belong to the cell at the border
        cell = torch.floor(position).nan_to_num(0.0).clamp(torch.zeros_like(cells), cells - 1)
        return cell.long(), position - cell

    def forward(self, x):  # (N, d) -> (N, C)
        cell, inside = self._locate(x, self.cells, self.sides)
        rows = (cell * self.strides).sum(-1, keepdim=True) + self.corners  # (N, 4^d)
        # contract one axis at a time, so that no products of 4^d basis functions are formed
        # `index_select` adds gradients in a fixed order, so that results do not depend on the number of threads
        around = self.coefficients.index_select(0, rows.flatten())
        around = around.reshape(len(rows), 4, rows.shape[1] // 4 * around.shape[1])  # (N, 4, 4^(d-1) C)
        out = torch.einsum("...nk,nkc->...nc", _cubic_basis(inside[..., :1]), around)
        for i in range(1, cell.shape[-1]):
            basis = torch.unsqueeze(_cubic_basis(inside[..., i : i + 1]), -1)
            out = torch.sum(torch.unflatten(out, -1, (4, -1)) * basis, -2)
        return out

    def core_tensor(self) -> Tensor:  # -> (cells_1 + 3, ..., cells_d + 3, C)
        return self.coefficients.unflatten(0, self.sizes)

    def factor_along(self, axis: int, t: Tensor, order: int) -> list[SparseRows]:  # -> order + 1 times (n, cells + 3)
        cells, sides = self.cells[axis], self.sides[axis]
        rows = self._locate(t, cells, sides)[0] + torch.arange(4, device=t.device)
        weights = derivatives_along(lambda u: _cubic_basis(self._locate(u, cells, sides)[1]), t, order)
        return [SparseRows(rows, weight) for weight in weights]


@NETWORKS.register("spline")
@dataclass(frozen=True)
class Spline(Network):
    r"""Multi-resolution cubic B-spline field :cite:p:`Unser1999`: the sum of one spline for each grid.

    The value at a point depends on 4^d coefficients of each grid only. First and second derivatives are continuous. The third
    derivative along an axis is constant between knots, and the fourth is zero there.

    Parameters
    ----------
    cells
        Number of intervals along the longest side, for each grid from coarse to fine.
    sides
        Length of each axis as a share of the longest, so that a long and narrow region has no unused coefficients; 1 for
        every axis if empty.
    """

    cells: tuple[int, ...] = (4, 8, 16, 32)
    sides: tuple[float, ...] = ()

    def __post_init__(self):
        check_fields(self, cells=several(SIZE), sides=several(number(0, 1, above=True), least=0))

    def _grids(self, n_in: int) -> list[tuple[int, ...]]:
        """Intervals along each axis of each grid."""
        sides = _sides(self, n_in)
        return [tuple(max(1, round(cells * side)) for side in sides) for cells in self.cells]

    def n_weights(self, n_in: int, n_out: int) -> int:
        return n_out * (1 + sum(math.prod(cells + 3 for cells in grid) for grid in self._grids(n_in)))

    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        sides = self.sides or (1.0,) * n_in
        return TensorProductSum([_SplineGrid(n_out, grid, sides) for grid in self._grids(n_in)], n_out)


class _CosineFactor(nn.Module):
    """``t -> cos(pi k (t + L) / (2 L))`` for k = 0 .. n - 1: (N, 1) -> (N, n)."""

    def __init__(self, n: int, half: float):
        super().__init__()
        frequencies = (math.pi / (2 * half)) * torch.arange(n, dtype=torch.float64)
        # no buffers, as those are rounded where a network is read in single precision
        self.frequencies, self.phase = frequencies[:, None], frequencies * half

    def forward(self, t):  # (N, 1) -> (N, n)
        like = t.value if isinstance(t, Jet) else t
        return torch.cos(F.linear(t, self.frequencies.to(like), self.phase.to(like)))


@NETWORKS.register("cosine")
@dataclass(frozen=True)
class Cosine(Network):
    r"""Cosine series ``f(x) = sum_k c_k prod_i cos(pi k_i (x_i + L_i) / (2 L_i))`` with ``0 <= k_i < n_i`` :cite:p:`Solin2020`.

    It is linear in its coefficients, which start at zero. These functions are the eigenfunctions of the Laplacian on the box with half-sides
    L whose normal derivative vanishes at its border. In this basis a stationary Gaussian process has independent coefficients.

    Parameters
    ----------
    waves
        n for the longest side. The other sides have proportionally fewer.
    sides
        Length of each axis as a share of the longest; 1 for every axis if empty.
    margin
        Distance in box units by which the box of the series extends beyond the unit box.

    Examples
    --------
    >>> import torch
    >>> net = Cosine(waves=6, sides=(1.0, 0.5)).build(2, 3, torch.Generator())
    >>> net.core.shape, net(torch.zeros(5, 2)).shape
    (torch.Size([6, 4, 3]), torch.Size([5, 3]))
    """

    waves: int = 28
    sides: tuple[float, ...] = ()
    margin: float = 0.15

    def __post_init__(self):
        check_fields(self, sides=several(number(0, 1), least=0), margin=number(0))

    def half_sides(self, n_in: int) -> list[float]:
        """L of each axis, in box units."""
        return [side + self.margin for side in _sides(self, n_in)]

    def sizes(self, n_in: int) -> list[int]:
        """n of each axis."""
        halves = self.half_sides(n_in)
        return [max(2, math.ceil(self.waves * half / max(halves) - 1e-9)) for half in halves]

    def squared_frequencies(self, n_in: int) -> Tensor:  # -> (n_1 .. n_d,)
        """Squared length of the frequency of each function, in radians per box unit, in the order of the flattened core."""
        axes = [
            (math.pi / (2 * half) * torch.arange(n, dtype=torch.float64)) ** 2
            for n, half in zip(self.sizes(n_in), self.half_sides(n_in), strict=True)
        ]
        return sum(torch.meshgrid(*axes, indexing="ij")).flatten()

    def squared_norms(self, n_in: int) -> Tensor:  # -> (n_1 .. n_d,)
        """Integral of the square of each function over the box of the series."""
        axes = [
            torch.where(torch.arange(n) == 0, 2.0, 1.0).double() * half
            for n, half in zip(self.sizes(n_in), self.half_sides(n_in), strict=True)
        ]
        return math.prod(torch.meshgrid(*axes, indexing="ij")).flatten()

    def n_weights(self, n_in: int, n_out: int) -> int:
        return math.prod(self.sizes(n_in)) * n_out

    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        sizes = self.sizes(n_in)
        factors = [_CosineFactor(n, half) for n, half in zip(sizes, self.half_sides(n_in), strict=True)]
        return TuckerNet(factors, torch.zeros(*sizes, n_out, dtype=torch.float32))


class _Bumps(nn.Module):
    def __init__(self, n_out: int, n_in: int, width: float):
        super().__init__()
        self.centres, self.width = nn.Parameter(torch.zeros(n_out, n_in, dtype=torch.float32)), width

    def forward(self, x):  # (N, d) -> (N, C)
        # |x - c|^2 = |x|^2 - 2 c.x + |c|^2
        square = torch.unsqueeze(torch.sum(x * x, -1), -1)
        distance = F.linear(x, -2 * self.centres, self.centres.square().sum(1)) + square
        return torch.exp(distance * (-0.5 / self.width**2))


@NETWORKS.register("bumps")
@dataclass(frozen=True)
class Bumps(Network):
    r"""One Gaussian bump for each channel: ``f_c(x) = exp(-|x - x_c|^2 / (2 width^2))``, with the centres as parameters.

    Parameters
    ----------
    width
        Standard deviation in box units.
    """

    width: float = 0.1

    def __post_init__(self):
        check_fields(self)

    def n_weights(self, n_in: int, n_out: int) -> int:
        return n_in * n_out

    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        bumps = _Bumps(n_out, n_in, self.width)
        nn.init.uniform_(bumps.centres, -1.0, 1.0, generator=generator)
        return bumps


def _sides(network: Spline | Cosine, n_in: int) -> tuple[float, ...]:
    """Length of each axis as a share of the longest."""
    sides = network.sides or (1.0,) * n_in
    if len(sides) != n_in:
        msg = f"`{type(network).__name__}(sides={network.sides})` has {len(sides)} axes: expected one for each of the {n_in} coordinates"
        raise ValueError(msg)
    return sides
