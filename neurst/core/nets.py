r"""Coordinate networks on the unit box, each layer written once for tensor and jet.

A network is a frozen specification (numbers only, so it can be stored in a file) with one method,
``build(n_in, n_out, generator)``, that gives the ``nn.Module`` mapping (N, n_in) coordinates in [-1, 1] to (N, n_out).
:data:`NETWORKS` names them all.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core.jet import seed
from neurst.core.lattice import Taps


class Network(ABC):
    """A network that can be named, stored and built."""

    @abstractmethod
    def build(self, n_in: int, n_out: int, generator: torch.Generator | None = None) -> nn.Module:
        """The module (N, n_in) -> (N, n_out), its start drawn from `generator`."""


def _positive(spec: Network, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not (value > 0 and math.isfinite(value)):
            msg = f"`{type(spec).__name__}({name}={value!r})`: expected a positive number"
            raise ValueError(msg)


def _linear(n_in: int, n_out: int, bound: float, generator: torch.Generator | None, bias: bool = True) -> nn.Linear:
    # without nn.Linear's own start, which would draw from the global generator
    linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias)
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    if bias:
        # biases spread over the inputs' range, as nn.Linear's own start does
        nn.init.uniform_(linear.bias, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
    return linear


class Sine(nn.Module):
    """x -> sin(omega (W x + b)), the SIREN layer :cite:p:`Sitzmann2020`."""

    def __init__(self, linear: nn.Linear, omega: float):
        super().__init__()
        self.linear, self.omega = linear, omega

    def forward(self, x):  # (N, n_in) -> (N, n_out), tensor or jet
        # omega goes on the small weight, not on the (N, n_out) result or its jet
        bias = None if self.linear.bias is None else self.omega * self.linear.bias
        return torch.sin(F.linear(x, self.omega * self.linear.weight, bias))


def _sine_layers(widths: list[int], omega: float, generator: torch.Generator | None, bias: bool) -> list[nn.Module]:
    """Sine layers with the SIREN start: unit-variance arguments at every depth."""
    layers = []
    for k, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        bound = 1 / n_in if k == 0 else math.sqrt(6 / n_in) / omega
        layers.append(Sine(_linear(n_in, n_out, bound, generator, bias), omega))
    return layers


@dataclass(frozen=True)
class Siren(Network):
    r"""Sine network :cite:p:`Sitzmann2020`: ``h_l = sin(omega (W_l h_{l-1} + b_l))``, then a linear map.

    Parameters
    ----------
    width, depth
        Hidden features and number of sine layers.
    omega
        Radians per unit of the box at the first layer, and the gain of the others: how fine the field can vary.

    Examples
    --------
    >>> import torch
    >>> net = Siren(width=16, depth=2).build(2, 3)
    >>> net(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    width: int = 128
    depth: int = 3
    omega: float = 5.0

    def __post_init__(self):
        _positive(self, "width", "depth", "omega")

    def build(self, n_in: int, n_out: int, generator: torch.Generator | None = None) -> nn.Module:
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
        Random frequencies.
    scale
        Their standard deviation, in radians per unit of the box.
    """

    width: int = 128
    depth: int = 2
    n_features: int = 64
    scale: float = 4.0

    def __post_init__(self):
        _positive(self, "width", "depth", "n_features", "scale")

    def build(self, n_in: int, n_out: int, generator: torch.Generator | None = None) -> nn.Module:
        frequencies = self.scale * torch.randn(self.n_features, n_in, generator=generator)
        widths = [2 * self.n_features] + [self.width] * self.depth
        layers: list[nn.Module] = [_FourierFeatures(frequencies)]
        for a, b in itertools.pairwise(widths):
            layers += [_linear(a, b, math.sqrt(6 / a), generator), nn.SiLU()]
        return nn.Sequential(*layers, _linear(self.width, n_out, math.sqrt(1 / self.width), generator))


class _LowRankTensor(nn.Module):
    def __init__(self, factors: list[nn.Module], core: Tensor):  # core (r_1, ..., r_d, C)
        super().__init__()
        self.factors, self.core = nn.ModuleList(factors), nn.Parameter(core)

    def forward(self, x):  # (N, d) -> (N, C)
        # contract one mode at a time: (N, r_1 .. r_d C) never stands in memory
        first, *rest = [factor(x[..., i : i + 1]) for i, factor in enumerate(self.factors)]
        out = F.linear(first, self.core.flatten(1).T)
        for i, factor in enumerate(rest, start=1):
            out = torch.unflatten(out, -1, (self.core.shape[i], -1))
            out = torch.sum(out * torch.unsqueeze(factor, -1), -2)
        return out

    def tucker_terms(self) -> list[nn.Module]:
        return [self]

    def tensor(self) -> Tensor:  # -> (r_1, ..., r_d, C)
        return self.core

    def along(self, axis: int, t: Tensor, order: int) -> list[Tensor]:  # (n, 1) -> order + 1 times (n, r)
        return _derivatives(self.factors[axis], t, order)


@dataclass(frozen=True)
class LowRank(Network):
    r"""Low-rank tensor function :cite:p:`Luo2025`: ``f(x) = C x_1 U_1(x_1) ... x_d U_d(x_d)``.

    Each factor is a bias-free sine network of one coordinate, ``U_i(t) = W_3 sin(omega W_2 sin(omega W_1 t))``.
    Bias-free sines are odd in t: each factor is therefore read at ``t + 2``, one box to the right, which also serves
    non-odd signals.

    Parameters
    ----------
    rank
        r, the same for every axis.
    width
        Hidden features of each factor.
    omega
        Radians per unit of the box.
    """

    rank: int = 32
    width: int = 128
    omega: float = 5.0

    def __post_init__(self):
        _positive(self, "rank", "width", "omega")

    def build(self, n_in: int, n_out: int, generator: torch.Generator | None = None) -> nn.Module:
        factors = []
        for _ in range(n_in):
            layers = _sine_layers([1, self.width, self.width], self.omega, generator, bias=False)
            last = _linear(self.width, self.rank, math.sqrt(6 / self.width), generator, bias=False)
            factors.append(nn.Sequential(_Shift(2.0), *layers, last))
        shape = (self.rank,) * n_in + (n_out,)
        core = torch.randn(shape, generator=generator) / math.sqrt(self.rank**n_in)
        return _LowRankTensor(factors, core)


class _Shift(nn.Module):
    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


def _derivatives(function: Callable, t: Tensor, order: int) -> list[Tensor]:  # (n, 1) -> order + 1 times (n, r)
    """Values and derivatives of a function of one coordinate."""
    if order == 0:
        return [function(t)]
    jet = function(seed(t, order=order))
    return [jet.value, *(jet.derivative(k)[0] for k in range(1, order + 1))]


def _cubic_basis(u):  # (N, 1) in [0, 1], tensor or jet -> (N, 4)
    """The four uniform cubic B-splines over a cell :cite:p:`Unser1999`."""
    square = u * u
    cube = square * u
    rising = cube * (1 / 6)
    middle = u * 0.5 + square * 0.5 - cube * 0.5 + 1 / 6
    second = cube * 0.5 - square + 2 / 3
    return torch.cat([1 - (rising + middle + second), second, middle, rising], -1)


class _SplineGrid(nn.Module):
    """Uniform cubic B-spline on the box: `cells` intervals an axis, 3 more coefficients for the border."""

    def __init__(self, n_out: int, cells: tuple[int, ...], sides: tuple[float, ...]):
        super().__init__()
        sizes = [c + 3 for c in cells]
        self.coefficients = nn.Parameter(torch.zeros(math.prod(sizes), n_out))
        self.sizes = sizes
        strides = torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])
        corners = torch.tensor(list(itertools.product(range(4), repeat=len(sizes))))
        self.register_buffer("cells", torch.tensor(cells), persistent=False)
        self.register_buffer("sides", torch.tensor(sides), persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("corners", corners @ strides, persistent=False)

    def _locate(self, x, cells: Tensor, sides: Tensor):
        """Cells that coordinates lie in, and where in them."""
        position = (x + sides) * (cells / (2 * sides))
        # beyond the box the polynomial of the border cell goes on
        cell = torch.floor(position).clamp(torch.zeros_like(cells), cells - 1)
        return cell.long(), position - cell

    def forward(self, x):  # (N, d) -> (N, C)
        cell, inside = self._locate(x, self.cells, self.sides)
        rows = (cell * self.strides).sum(-1, keepdim=True) + self.corners  # (N, 4^d)
        # one axis at a time, so that no product of bases is as wide as 4^d
        around = self.coefficients[rows].unflatten(1, (4, -1)).flatten(2)  # (N, 4, 4^(d-1) C)
        out = torch.einsum("...nk,nkc->...nc", _cubic_basis(inside[..., :1]), around)
        for i in range(1, cell.shape[-1]):
            basis = torch.unsqueeze(_cubic_basis(inside[..., i : i + 1]), -1)
            out = torch.sum(torch.unflatten(out, -1, (4, -1)) * basis, -2)
        return out

    def tensor(self) -> Tensor:  # -> (cells_1 + 3, ..., cells_d + 3, C)
        return self.coefficients.unflatten(0, self.sizes)

    def along(self, axis: int, t: Tensor, order: int) -> list[Taps]:  # (n, 1) -> order + 1 times (n, cells + 3)
        cells, sides = self.cells[axis], self.sides[axis]
        rows = self._locate(t, cells, sides)[0] + torch.arange(4, device=t.device)
        weights = _derivatives(lambda u: _cubic_basis(self._locate(u, cells, sides)[1]), t, order)
        return [Taps(rows, weight) for weight in weights]


class _Sum(nn.Module):
    def __init__(self, terms: list[nn.Module], n_out: int):
        super().__init__()
        self.terms, self.bias = nn.ModuleList(terms), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return sum((term(x) for term in self.terms), start=self.bias)

    def tucker_terms(self) -> list[nn.Module]:
        return list(self.terms)


@dataclass(frozen=True)
class Spline(Network):
    r"""Multi-resolution cubic B-spline field :cite:p:`Unser1999`: the sum of one spline for each grid.

    Only the 4^d coefficients around a point are read. First and second derivatives are exact and continuous; the third
    is piecewise constant along an axis, and fourth ones hold between knots only.

    Parameters
    ----------
    cells
        Intervals along the longest side of each grid, coarse to fine.
    sides
        Length of each axis as a share of the longest, so that no coefficient lies outside a long and narrow region; 1 for
        every axis if empty.
    """

    cells: tuple[int, ...] = (4, 8, 16, 32)
    sides: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "cells", tuple(int(c) for c in self.cells))
        object.__setattr__(self, "sides", tuple(float(s) for s in self.sides))
        if not self.cells or min(self.cells) < 1:
            msg = f"`Spline(cells={self.cells})`: expected one or more intervals per axis for each grid"
            raise ValueError(msg)
        if not all(0 < side <= 1 for side in self.sides):
            msg = f"`Spline(sides={self.sides})`: expected shares of the longest side, above 0 and at most 1"
            raise ValueError(msg)

    def build(self, n_in: int, n_out: int, generator: torch.Generator | None = None) -> nn.Module:
        sides = self.sides or (1.0,) * n_in
        if len(sides) != n_in:
            msg = f"`Spline(sides={self.sides})` has {len(sides)} axes: expected one for each of the {n_in} coordinates"
            raise ValueError(msg)
        grids = [tuple(max(1, round(cells * side)) for side in sides) for cells in self.cells]
        return _Sum([_SplineGrid(n_out, grid, sides) for grid in grids], n_out)


NETWORKS: dict[str, type[Network]] = {"siren": Siren, "fourier": Fourier, "lowrank": LowRank, "spline": Spline}


def as_network(network: str | Network) -> Network:
    """The specification behind a name, or the specification itself.

    Raises
    ------
    ValueError
        If the name is none of :data:`NETWORKS`.
    """
    if isinstance(network, Network):
        return network
    if network not in NETWORKS:
        msg = f"`network={network!r}` is unknown: choose one of {sorted(NETWORKS)}, or pass e.g. `Siren(width=64)`"
        raise ValueError(msg)
    return NETWORKS[network]()


def to_dict(network: Network) -> dict:
    """Name and numbers of a network, as plain values that a file can hold."""
    name = next(name for name, cls in NETWORKS.items() if cls is type(network))
    numbers = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(network).items()}
    return {"name": name} | {k: v for k, v in numbers.items() if v != []}  # an empty list has no type in a file


def from_dict(spec: dict) -> Network:
    """The inverse of :func:`to_dict`."""
    numbers = {k: v for k, v in spec.items() if k != "name"}
    return NETWORKS[str(spec["name"])](**numbers)
