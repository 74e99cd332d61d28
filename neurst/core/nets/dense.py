"""Networks of dense layers: sine networks, random Fourier features, low-rank tensor functions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core.arguments import check_fields
from neurst.core.nets.base import NETWORKS, Network
from neurst.core.tensor_product import TensorProduct, derivatives_along


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


@NETWORKS.register("siren")
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


@NETWORKS.register("fourier")
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


class TuckerNet(TensorProduct):
    """A Tucker product: a core tensor with a network of one coordinate for each axis."""

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


@NETWORKS.register("lowrank")
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
        return TuckerNet(factors, core)


class _Shift(nn.Module):
    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by
