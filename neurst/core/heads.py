"""Heads: maps from the latent channels of a network to the predictor of the observed values."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core.jet import Jet


class Head(nn.Module, ABC):
    """A map ``(z, channels) -> eta`` from latent channels (N, r), a tensor or a jet, to predictors (N, C)."""

    @abstractmethod
    def forward(self, z: Tensor | Jet, channels: Tensor | None = None) -> Tensor | Jet:
        """The predictors of all channels, or of those with the indices `channels`."""

    def n_channels(self, n_latent: int) -> int:
        """C, the number of predictors, for a given number of latent channels."""
        return n_latent

    def prior(self) -> Tensor | float:
        """Negative log-prior of the weights that are learned, in nats."""
        return 0.0

    def arguments(self) -> dict[str, Tensor]:
        """The arguments that construct this head again, as tensors."""
        return {}


class Identity(Head):
    """The head whose predictors are the latent channels themselves."""

    def forward(self, z: Tensor | Jet, channels: Tensor | None = None) -> Tensor | Jet:
        return z if channels is None else z[..., channels]


class Affine(Head):
    """A fixed change of units, ``eta = shift + scale z``. It lets a field be fitted in units in which its values are about one.

    Parameters
    ----------
    shift, scale
        (C,) or ().
    """

    def __init__(self, shift: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("shift", shift.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, z: Tensor | Jet, channels: Tensor | None = None) -> Tensor | Jet:
        if channels is None:
            return z * self.scale + self.shift
        shift, scale = (part if part.ndim == 0 else part[channels] for part in (self.shift, self.scale))
        return z[..., channels] * scale + shift

    def arguments(self) -> dict[str, Tensor]:
        return {"shift": self.shift, "scale": self.scale}


class Loadings(Head):
    r"""A linear head ``eta = gain (b + V z)`` from r latent to C observed channels, with prior ``V ~ N(0, 1)``.

    The prior fixes the scale that z and V share. At the best scale of each component, ``|V_c|^2 / 2 + lam TV(z_c)`` is
    ``(3/2) (lam |V_c| TV(z_c))^(2/3)``. This is concave: weak components vanish, and strong ones keep their edges.

    Parameters
    ----------
    weight, bias
        Initial V (C, r) and b (C,).
    gain
        (C,) the fixed unit of each channel, such as its standard deviation; 1 if None. V and b are learned in this unit, so that one
        learning rate suits every channel.
    """

    def __init__(self, weight: Tensor, bias: Tensor, gain: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.register_buffer("gain", None if gain is None else gain.detach().clone())

    def loadings(self) -> Tensor:  # -> (C, r)
        """``gain V``."""
        return self.weight if self.gain is None else self.gain[:, None] * self.weight

    def intercept(self) -> Tensor:  # -> (C,)
        """``gain b``."""
        return self.bias if self.gain is None else self.gain * self.bias

    def forward(self, z: Tensor | Jet, channels: Tensor | None = None) -> Tensor | Jet:
        weight, bias = self.loadings(), self.intercept()
        if channels is not None:
            weight, bias = weight[channels], bias[channels]
        return F.linear(z, weight, bias)

    def n_channels(self, n_latent: int) -> int:
        return len(self.weight)

    def prior(self) -> Tensor:
        """``sum V^2 / 2``."""
        return self.weight.square().sum() / 2

    def arguments(self) -> dict[str, Tensor]:
        gain = {} if self.gain is None else {"gain": self.gain}
        return {"weight": self.weight, "bias": self.bias, **gain}
