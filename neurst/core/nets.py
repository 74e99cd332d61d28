r"""Coordinate networks on the unit box, each layer written once for tensor and jet.

A network is a frozen specification of plain numbers, so that it can be stored in a file. Its method
``build(n_in, n_out, generator)`` gives the ``nn.Module`` that maps (N, n_in) coordinates in [-1, 1] to (N, n_out).
:data:`NETWORKS` maps names to networks.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core.arguments import SIZE, check_fields, number, several
from neurst.core.jet import Jet
from neurst.core.spec import Registry
from neurst.core.tensor_product import SparseRows, TensorProduct, TensorProductSum, derivatives_along


class Network(ABC):
    """A network that can be named, stored and built."""

    @abstractmethod
    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        """The module (N, n_in) -> (N, n_out) in float32, its initial weights drawn from `generator`."""

    @abstractmethod
    def n_weights(self, n_in: int, n_out: int) -> int:
        """The number of values in the ``state_dict()`` of the module, computed without building it.

        A stored network is built only if the file holds this many values, so that a damaged file cannot exhaust the memory.
        """


def _linear(n_in: int, n_out: int, bound: float, generator: torch.Generator, bias: bool = True) -> nn.Linear:
    # skip_init: nn.Linear's own initialisation would draw from torch's global generator
    linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias, dtype=torch.float32)
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    if bias:
        # biases spread over the range of the inputs, as in nn.Linear's own initialisation
        nn.init.uniform_(linear.bias, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
    return linear


class Sine(nn.Module):
    """x -> sin(omega (W x + b)), the SIREN layer :cite:p:`Sitzmann2020`."""

    def __init__(self, linear: nn.Linear, omega: float):
        super().__init__()
        self.linear, self.omega = linear, omega

    def forward(self, x):  # (N, n_in) -> (N, n_out), tensor or jet
        # the small weight is multiplied by omega, rather than the (N, n_out) result or its jet
        bias = None if self.linear.bias is None else self.omega * self.linear.bias
        return torch.sin(F.linear(x, self.omega * self.linear.weight, bias))


def _sine_layers(widths: list[int], omega: float, generator: torch.Generator, bias: bool) -> list[nn.Module]:
    """Sine layers with the SIREN initialisation, under which the arguments of the sines have unit variance at every depth."""
    layers = []
    for k, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        bound = 1 / n_in if k == 0 else math.sqrt(6 / n_in) / omega
        layers.append(Sine(_linear(n_in, n_out, bound, generator, bias), omega))
    return layers


def _n_dense(n_in: int, width: int, n_out: int, n_inner: int) -> int:
    """Weights and biases of ``n_in -> width -> ... -> width -> n_out``, with `n_inner` maps from width to width."""
    return (n_in + 1) * width + n_inner * (width + 1) * width + (width + 1) * n_out


@dataclass(frozen=True)
class Siren(Network):
    r"""Sine network :cite:p:`Sitzmann2020`: ``h_l = sin(omega (W_l h_{l-1} + b_l))``, then a linear map.

    Parameters
    ----------
    width, depth
        Hidden features and number of sine layers.
    omega
        Frequency of the first layer in radians per unit of the box, and the gain of the other layers. With a larger value the
        field can vary on a finer scale.

    Examples
    --------
    >>> import torch
    >>> net = Siren(width=16, depth=2).build(2, 3, torch.Generator().manual_seed(0))
    >>> net(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    width: int = 128
    depth: int = 3
    omega: float = 5.0

    def __post_init__(self):
        check_fields(self)

    def n_weights(self, n_in: int, n_out: int) -> int:
        return _n_dense(n_in, self.width, n_out, self.depth - 1)

    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        layers = _sine_layers([n_in] + [self.width] * self.depth, self.omega, generator, bias=True)
        last = _linear(self.width, n_out, math.sqrt(6 / self.width) / self.omega, generator)
        return nn.Sequential(*layers, last)


class _FourierFeatures(nn.Module):
    def __init__(self, frequencies: Tensor):  # (m, d)
        super().__init__()
        self.register_buffer("frequencies", frequencies)

    def forward(self, x):  # (N, d) -> (N, 2 m)
        phase = F.linear(x, self.frequencies)
        return torch.cat([torch.sin(phase), torch.cos(phase)], -1)


@dataclass(frozen=True)
class Fourier(Network):
    r"""Random Fourier features :cite:p:`Tancik2020`, ``[sin Bx, cos Bx]`` with ``B ~ N(0, scale^2)``, then a SiLU network.

    Parameters
    ----------
    width, depth
        Hidden features and number of hidden layers.
    n_features
        Number of random frequencies.
    scale
        Standard deviation of the frequencies, in radians per unit of the box.
    """

    width: int = 128
    depth: int = 2
    n_features: int = 64
    scale: float = 4.0

    def __post_init__(self):
        check_fields(self)

    def n_weights(self, n_in: int, n_out: int) -> int:
        return n_in * self.n_features + _n_dense(2 * self.n_features, self.width, n_out, self.depth - 1)

    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        frequencies = self.scale * torch.randn(self.n_features, n_in, generator=generator, dtype=torch.float32)
        widths = [2 * self.n_features] + [self.width] * self.depth
        layers: list[nn.Module] = [_FourierFeatures(frequencies)]
        for a, b in itertools.pairwise(widths):
            layers += [_linear(a, b, math.sqrt(6 / a), generator), nn.SiLU()]
        return nn.Sequential(*layers, _linear(self.width, n_out, math.sqrt(1 / self.width), generator))


class _LowRankTensor(TensorProduct):
    def __init__(self, factors: list[nn.Module], core: Tensor):  # core (r_1, ..., r_d, C)
        super().__init__()
        self.factors, self.core = nn.ModuleList(factors), nn.Parameter(core)

    def forward(self, x):  # (N, d) -> (N, C)
        # contract one axis at a time, so that no (N, r_1 .. r_d C) tensor is formed
        first, *rest = [factor(x[..., i : i + 1]) for i, factor in enumerate(self.factors)]
        out = F.linear(first, self.core.flatten(1).T)
        for i, factor in enumerate(rest, start=1):
            out = torch.unflatten(out, -1, (self.core.shape[i], -1))
            out = torch.sum(out * torch.unsqueeze(factor, -1), -2)
        return out

    def core_tensor(self) -> Tensor:  # -> (r_1, ..., r_d, C)
        return self.core

    def factor_along(self, axis: int, t: Tensor, order: int) -> list[Tensor]:  # (n, 1) -> order + 1 times (n, r)
        return derivatives_along(self.factors[axis], t, order)


@dataclass(frozen=True)
class LowRank(Network):
    r"""Low-rank tensor function :cite:p:`Luo2025`: ``f(x) = C x_1 U_1(x_1) ... x_d U_d(x_d)``.

    Each factor is a sine network of one coordinate without biases, ``U_i(t) = W_3 sin(omega W_2 sin(omega W_1 t))``. Such a
    network is an odd function of t. It is therefore evaluated at ``t + 2``, which lies in [1, 3], where it can have any shape.

    Parameters
    ----------
    rank
        r, the same for every axis.
    width
        Hidden features of each factor.
    omega
        Frequency in radians per unit of the box.
    """

    rank: int = 32
    width: int = 128
    omega: float = 5.0

    def __post_init__(self):
        check_fields(self)

    def n_weights(self, n_in: int, n_out: int) -> int:
        return n_in * self.width * (1 + self.width + self.rank) + self.rank**n_in * n_out

    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        factors = []
        for _ in range(n_in):
            layers = _sine_layers([1, self.width, self.width], self.omega, generator, bias=False)
            last = _linear(self.width, self.rank, math.sqrt(6 / self.width), generator, bias=False)
            factors.append(nn.Sequential(_Shift(2.0), *layers, last))
        shape = (self.rank,) * n_in + (n_out,)
        core = torch.randn(shape, generator=generator, dtype=torch.float32) / math.sqrt(self.rank**n_in)
        return _LowRankTensor(factors, core)


class _Shift(nn.Module):
    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


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
        return _LowRankTensor(factors, torch.zeros(*sizes, n_out, dtype=torch.float32))


class _Bumps(nn.Module):
    def __init__(self, n_out: int, n_in: int, width: float):
        super().__init__()
        self.centres, self.width = nn.Parameter(torch.zeros(n_out, n_in, dtype=torch.float32)), width

    def forward(self, x):  # (N, d) -> (N, C)
        # |x - c|^2 = |x|^2 - 2 c.x + |c|^2
        square = torch.unsqueeze(torch.sum(x * x, -1), -1)
        distance = F.linear(x, -2 * self.centres, self.centres.square().sum(1)) + square
        return torch.exp(distance * (-0.5 / self.width**2))


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


class ConcatNet(nn.Module):
    """Networks whose leading outputs are concatenated: (N, d) -> (N, m), tensor or jet.

    Parameters
    ----------
    nets
        The networks.
    widths
        Number of leading outputs taken from each network.
    """

    def __init__(self, nets: list[nn.Module], widths: list[int]):
        super().__init__()
        self.nets, self.widths = nn.ModuleList(nets), tuple(map(int, widths))

    def forward(self, x):
        return torch.cat([net(x)[..., :width] for net, width in zip(self.nets, self.widths, strict=True)], -1)


NETWORKS = Registry("network", "neurst.core.nets.NETWORKS", Network, "neurst.core.nets.Siren(width=64)")
for _name, _cls in {
    "siren": Siren,
    "fourier": Fourier,
    "lowrank": LowRank,
    "spline": Spline,
    "cosine": Cosine,
    "bumps": Bumps,
}.items():
    NETWORKS.register(_name)(_cls)
