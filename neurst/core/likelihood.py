r"""Data terms: negative log-likelihoods of observed values given a predictor eta, summed over observed entries.

Each is an ``nn.Module`` (its learned parameters, if any, are fitted with the field) called as
``likelihood(eta, y, weight, channels)``: `eta` and `y` are (N, C), `weight` is None or broadcasts to (N, C) with 0 where an
entry is missing, and `channels` names the columns at hand when they are a subset. Additive constants that do not depend
on the field or the parameters are left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Likelihood(nn.Module, ABC):
    """A negative log-likelihood and its inverse link."""

    @abstractmethod
    def forward(self, eta: Tensor, y: Tensor, weight: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """The summed negative log-likelihood, ()."""

    def mean(self, eta: Tensor) -> Tensor:
        """Inverse link: the expected value at predictor `eta`. The identity unless a count likelihood says exp."""
        return eta

    def average(self, eta: Tensor) -> Tensor:  # (Q, N, C) -> (N, C)
        """The predictor whose expected value is the mean over the first axis of those at `eta`."""
        return eta.mean(0)


def _log_mean_exp(eta: Tensor) -> Tensor:  # (Q, N, C) -> (N, C)
    return eta.logsumexp(0) - math.log(len(eta))


def _total(terms: Tensor, weight: Tensor | None) -> Tensor:
    return terms.sum() if weight is None else (terms * weight).sum()


def _observed(y: Tensor, weight: Tensor | None) -> Tensor:
    """Values with the missing ones set to zero, so that no NaN reaches a gradient."""
    return y if weight is None else torch.where(weight > 0, y, 0.0)


def _pick(parameter: Tensor, channels: Tensor | None) -> Tensor:
    return parameter if channels is None or parameter.numel() == 1 else parameter[channels]


class Gaussian(Likelihood):
    r"""Squared form: :math:`\sum \tfrac12 ((y - \eta) / s_c)^2 + \log s_c`.

    Parameters
    ----------
    scale
        Noise standard deviation(s): a number, or one per channel (C,).
    learned
        Fit the scales with the field, starting from `scale`.
    """

    def __init__(self, scale: float | Tensor = 1.0, *, learned: bool = False):
        super().__init__()
        log_scale = torch.atleast_1d(torch.as_tensor(scale, dtype=torch.get_default_dtype())).log()
        self.log_scale = nn.Parameter(log_scale, requires_grad=learned)

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
    r"""Root form: :math:`\sqrt{n}\,\|y - \eta\|_F`, n observed entries :cite:p:`Belloni2011`.

    It is :math:`\min_s \tfrac{1}{2s} \|y-\eta\|^2 + \tfrac{n s}{2}`: the noise level is estimated with the field, so the prior strength
    need not know it. Of degree one in y, like the penalties.
    """

    def forward(self, eta, y, weight=None, channels=None):
        return _root(_observed(y, weight) - eta, weight)


class Truncated(Likelihood):
    r"""Truncated residual for mixed noise: :math:`\sqrt{n}\,\|\mathrm{clip}(y - \eta, -\tau, \tau)\|_F`.

    It is :math:`\min_S \sqrt{n (\|y - \eta - S\|_F^2 + \tau^2 \|S\|_0)}`: residuals beyond tau (impulses, stripes, dead lines) are paid
    for once, by an entry of S, and stop pulling. Its value is that of the residual left by the soft-thresholded sparse term
    of :cite:p:`Luo2025`, :math:`S = \mathrm{soft}(y - \eta, \tau)`.

    Parameters
    ----------
    tau
        Threshold in the units of y.
    """

    def __init__(self, tau: float = 0.5):
        super().__init__()
        if not tau > 0:
            msg = f"`tau={tau!r}`: expected a positive threshold in the units of the data"
            raise ValueError(msg)
        self.tau = tau

    def forward(self, eta, y, weight=None, channels=None):
        return _root((_observed(y, weight) - eta).clamp(-self.tau, self.tau), weight)


class _PoissonTerm(torch.autograd.Function):
    """``sum exp(eta) - y eta`` with one buffer of eta's size: the slope is ``exp(eta) - y``. First derivatives only."""

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
    r"""Counts, log link: :math:`\sum e^\eta - y \eta`."""

    def forward(self, eta, y, weight=None, channels=None):
        if weight is None:
            return _PoissonTerm.apply(eta, y)
        return _total(eta.exp() - _observed(y, weight) * eta, weight)

    def mean(self, eta):
        return eta.exp()

    def average(self, eta):
        return _log_mean_exp(eta)


class NegativeBinomial(Likelihood):
    r"""Over-dispersed counts, log link: variance :math:`\mu + \mu^2 / \theta_c`, :math:`\mu = e^\eta`, one learned :math:`\theta_c` per channel.

    :math:`\sum (y + \theta) \log(\theta + \mu) - y \eta - \theta \log\theta - \log\Gamma(y + \theta) + \log\Gamma(\theta)`.

    Parameters
    ----------
    dispersion
        Start of :math:`\theta`, (C,) or a number; large is Poisson.
    """

    def __init__(self, dispersion: float | Tensor = 10.0):
        super().__init__()
        theta = torch.atleast_1d(torch.as_tensor(dispersion, dtype=torch.get_default_dtype()))
        self.log_dispersion = nn.Parameter(theta.log())

    def forward(self, eta, y, weight=None, channels=None):
        log_theta = _pick(self.log_dispersion, channels)
        theta, y = log_theta.exp(), _observed(y, weight)
        terms = (y + theta) * torch.logaddexp(log_theta.expand_as(eta), eta) - y * eta - theta * log_theta
        return _total(terms - torch.lgamma(y + theta) + torch.lgamma(theta), weight)

    def mean(self, eta):
        return eta.exp()

    def average(self, eta):
        return _log_mean_exp(eta)
