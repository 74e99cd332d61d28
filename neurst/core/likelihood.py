r"""Data terms: negative log-likelihoods of observed values given a predictor eta, summed over observed entries.

Each is an ``nn.Module``, whose learned parameters, if any, are fitted with the field. It is called as
``likelihood(eta, y, weight, channels)``: `eta` and `y` are (N, C), `weight` is None or broadcasts to (N, C) with 0 where an
entry is missing, and `channels` holds the indices of the columns when they are a subset. Additive constants that depend neither
on the field nor on the parameters are left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from neurst.core.arguments import POSITIVE
from neurst.core.jet import Jet


class Likelihood(nn.Module, ABC):
    """A negative log-likelihood and its inverse link: the identity, or exp where `log_link` is True."""

    log_link: ClassVar[bool] = False

    @abstractmethod
    def forward(self, eta: Tensor, y: Tensor, weight: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """The summed negative log-likelihood, ()."""

    def information(self, eta: Tensor) -> Tensor:  # (N, C) -> (N, C), or (C,)
        """Fisher information of a value about its predictor: the expected second derivative of the negative log-likelihood."""
        msg = f"{type(self).__name__} has no Fisher information: expected a likelihood of counts, or Gaussian"
        raise NotImplementedError(msg)

    def mean(self, eta: Tensor | Jet) -> Tensor | Jet:
        """Inverse link: the expected value at predictor `eta`."""
        return torch.exp(eta) if self.log_link else eta

    def average(self, eta: Tensor) -> Tensor:  # (Q, N, C) -> (N, C)
        """The predictor whose expected value is the mean, over the first axis, of the expected values at `eta`."""
        return eta.logsumexp(0) - math.log(len(eta)) if self.log_link else eta.mean(0)

    def arguments(self) -> dict[str, Tensor]:
        """The arguments that construct this likelihood again, as tensors."""
        return {}


def _total(terms: Tensor, weight: Tensor | None) -> Tensor:
    return terms.sum() if weight is None else (terms * weight).sum()


def _observed(y: Tensor, weight: Tensor | None) -> Tensor:
    """The values, with missing ones set to zero so that no NaN reaches a gradient."""
    return y if weight is None else torch.where(weight > 0, y, 0.0)


def _pick(parameter: Tensor, channels: Tensor | None) -> Tensor:
    return parameter if channels is None or parameter.numel() == 1 else parameter[channels]


class Gaussian(Likelihood):
    r"""Gaussian noise: :math:`\sum \tfrac12 ((y - \eta) / s_c)^2 + \log s_c`.

    Parameters
    ----------
    scale
        Standard deviation of the noise: a number, or one for each channel (C,).
    learned
        Fit the scales with the field, starting from `scale`.
    """

    def __init__(self, scale: float | Tensor = 1.0, *, learned: bool = False):
        super().__init__()
        log_scale = torch.atleast_1d(torch.as_tensor(scale, dtype=torch.float32)).log()
        self.log_scale = nn.Parameter(log_scale, requires_grad=learned)

    def arguments(self):
        return {"scale": self.log_scale.detach().exp()}

    def information(self, eta):
        return torch.exp(-2 * self.log_scale)

    def forward(self, eta, y, weight=None, channels=None):
        log_scale = _pick(self.log_scale, channels)
        residual = (_observed(y, weight) - eta) * torch.exp(-log_scale)
        return _total(residual.square() / 2 + log_scale, weight)


def _root(residual: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return residual.numel() ** 0.5 * torch.linalg.vector_norm(residual)
    weight = weight.expand_as(residual)
    return weight.sum().sqrt() * torch.linalg.vector_norm(residual * weight.sqrt())


class RootGaussian(Likelihood):
    r"""Gaussian noise of unknown level, the square root of the sum of squares: :math:`\sqrt{n}\,\|y - \eta\|_F`, n observed entries :cite:p:`Belloni2011`.

    It is :math:`\min_s \tfrac{1}{2s} \|y-\eta\|^2 + \tfrac{n s}{2}`: the noise level is estimated together with the field, so a good prior
    strength does not depend on it. Like the penalties, it is homogeneous of degree one.
    """

    def forward(self, eta, y, weight=None, channels=None):
        return _root(_observed(y, weight) - eta, weight)


class Truncated(Likelihood):
    r"""Truncated residual for mixed noise: :math:`\sqrt{n}\,\|\mathrm{clip}(y - \eta, -\tau, \tau)\|_F`.

    It is :math:`\min_S \sqrt{n (\|y - \eta - S\|_F^2 + \tau^2 \|S\|_0)}`: a residual beyond tau (an impulse, a stripe, a dead line) costs
    no more than an entry of S, and has no influence on the field. The value equals that of the residual that remains when the sparse term
    of :cite:p:`Luo2025`, :math:`S = \mathrm{soft}(y - \eta, \tau)`, is subtracted.

    Parameters
    ----------
    tau
        Threshold in the units of y.
    """

    def __init__(self, tau: float = 0.5):
        super().__init__()
        self.tau = POSITIVE("tau", float(tau))

    def arguments(self):
        return {"tau": torch.tensor(self.tau)}

    def forward(self, eta, y, weight=None, channels=None):
        return _root((_observed(y, weight) - eta).clamp(-self.tau, self.tau), weight)


class _PoissonTerm(torch.autograd.Function):
    """``sum exp(eta) - y eta``. It stores only its gradient ``exp(eta) - y``, to save memory. First derivatives only."""

    @staticmethod
    def forward(ctx, eta, y):
        slope = eta.exp()
        total = slope.sum() - torch.dot(y.flatten(), eta.flatten())
        ctx.save_for_backward(slope.sub_(y))
        return total

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope * grad, None


class Poisson(Likelihood):
    r"""Poisson counts with a log link: :math:`\sum e^\eta - y \eta`."""

    log_link = True

    def information(self, eta):
        return eta.exp()

    def forward(self, eta, y, weight=None, channels=None):
        if weight is None:
            return _PoissonTerm.apply(eta, y)
        return _total(eta.exp() - _observed(y, weight) * eta, weight)


class NegativeBinomial(Likelihood):
    r"""Over-dispersed counts with a log link: variance :math:`\mu + \mu^2 / \theta_c`, :math:`\mu = e^\eta`, one learned :math:`\theta_c` per channel.

    :math:`\sum (y + \theta) \log(\theta + \mu) - y \eta - \theta \log\theta - \log\Gamma(y + \theta) + \log\Gamma(\theta)`.

    Parameters
    ----------
    dispersion
        Initial :math:`\theta`, (C,) or a number; for large values the distribution is Poisson.
    """

    log_link = True

    def __init__(self, dispersion: float | Tensor = 10.0):
        super().__init__()
        theta = torch.atleast_1d(torch.as_tensor(dispersion, dtype=torch.float32))
        self.log_dispersion = nn.Parameter(theta.log())

    def arguments(self):
        return {"dispersion": self.log_dispersion.detach().exp()}

    def information(self, eta):
        return torch.sigmoid(self.log_dispersion - eta) * eta.exp()

    def forward(self, eta, y, weight=None, channels=None):
        log_theta = _pick(self.log_dispersion, channels)
        theta, y = log_theta.exp(), _observed(y, weight)
        terms = (y + theta) * torch.logaddexp(log_theta.expand_as(eta), eta) - y * eta - theta * log_theta
        return _total(terms - torch.lgamma(y + theta) + torch.lgamma(theta), weight)
