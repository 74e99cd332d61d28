r"""A member with a Gaussian-process prior: latent channels that are smooth at lengths chosen by marginal likelihood.

Each latent channel is a Gaussian process with a Matern-3/2 kernel of length :math:`\ell_c` and variance :math:`a_c`, in the basis of a cosine
series (:class:`neurst.core.nets.Cosine`), in which its coefficients are independent :cite:p:`Solin2020`:

.. math::
    z_c(x) = \sum_k w_{ck} \varphi_k(x), \qquad w_{ck} \sim N(0, a_c S_{\ell_c}(\omega_k)), \qquad
    \eta_{ig} = b_g + V_g \cdot z(x_i).

The work is linear in the number of spots. It has three stages.

1. Near the null model, the loadings ``V = U / sqrt(I)`` with U singular vectors of standardised residuals and I the mean Fisher
   information of each gene make the channels independent: each is a regression on scores with known noise. :math:`\ell_c`, :math:`a_c` and
   the noise :math:`\tau_c` (1 for Poisson counts, more if they are over-dispersed) maximise its marginal likelihood.
2. The loadings are solved for on these channels with the likelihood of the data, and a prior scaled by the strength `lam` and the noise.
3. The coefficients maximise their posterior with these loadings, by Newton steps with conjugate gradients.

Letters: N spots, G genes, r channels, m functions of the series.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurst.core.field import FittedField
from neurst.core.heads import Loadings
from neurst.core.likelihood import Likelihood
from neurst.core.nets import Cosine
from neurst.core.samples import Box
from neurst.spatial.data import SpotData
from neurst.spatial.matrix import dense

# candidates for the variance of the signal over that of the noise
RATIOS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RIDGE = 3.0  # prior precision of the loadings in units of their mean square near the null model


@dataclass(frozen=True, eq=False)
class LatentProcess:
    """Gaussian processes of the latent channels, whose lengths, variances and noise are known, and the data they are fitted to.

    Parameters
    ----------
    data
        Spots and genes.
    box, network
        Unit box, and specification of the cosine series.
    features
        (N, m) functions of the series at the spots.
    precision
        (N,) Fisher information of each spot near the null model, of mean 1.
    likelihood
        The data term.
    loadings
        (G, r) loadings V of the first stage.
    coefficients
        (m, r) posterior means of the first stage.
    lengths
        (r,) length of each kernel in box units.
    variance, noise
        (r,) variance of each channel as a multiple of its noise; variance of the noise relative to that of the likelihood.
    axes
        For each distinct length, directions of the series (m, m) as columns along which the coefficients are independent with prior variance 1,
        and the information (m,) of the spots about each.
    """

    data: SpotData
    box: Box
    network: Cosine
    features: Tensor
    precision: Tensor
    likelihood: Likelihood
    loadings: NDArray
    coefficients: Tensor
    lengths: NDArray
    variance: NDArray
    noise: NDArray
    axes: dict[float, tuple[NDArray, NDArray]]

    def prior(self) -> Tensor:  # -> (m, r)
        """Prior variance of each coefficient, relative to the noise."""
        d = self.data.coords.shape[1]
        each = [
            v * spectral_variance(self.network, d, length)
            for v, length in zip(self.variance, self.lengths, strict=True)
        ]
        return torch.stack(each, 1)

    def unit(self, lam: float) -> NDArray:  # -> (r,)
        """The unit of each channel in which the prior of the loadings, in units of each gene, is a standard normal distribution."""
        loadings = self.loadings / np.reshape(self.data.observation.gene_unit(self.data.values), (-1, 1))
        return np.sqrt((loadings**2).mean(0) / (RIDGE * lam * self.noise))

    def fit(self, lam: float) -> tuple[FittedField, NDArray, NDArray]:
        """The latent field, loadings (G, r) and intercepts (G,) with a prior of strength `lam`; 1 is the strength of the marginal likelihood."""
        observation, unit = self.data.observation, self.unit(lam)
        latent = (self.features @ self.coefficients.float()).double().numpy() * unit
        loadings, intercept = observation.solve_loadings(latent, self.data.values, self.likelihood)
        prior = self.prior() / lam * torch.from_numpy(unit**2)
        start = self.coefficients * torch.from_numpy(unit)
        coefficients = self._newton(torch.from_numpy(loadings), torch.from_numpy(intercept), start, prior)
        net = self.network.build(self.data.coords.shape[1], len(unit), torch.Generator())
        with torch.no_grad():
            net.core.copy_(coefficients.unflatten(0, net.core.shape[:-1]))
        head = Loadings(torch.from_numpy(loadings), torch.from_numpy(intercept))
        field = FittedField(
            self.box,
            self.network,
            net.requires_grad_(False).eval(),
            head.requires_grad_(False),
            self.likelihood,
            len(unit),
            lam,
            {},
        )
        return field, loadings, intercept

    def _newton(self, loadings: Tensor, intercept: Tensor, start: Tensor, prior: Tensor, *, steps: int = 4) -> Tensor:
        """Coefficients (m, r) that maximise their posterior with loadings (G, r), from the coefficients `start`."""
        values = torch.from_numpy(dense(self.data.values)).float()
        offset = self.data.observation.offset()
        shift = intercept.float() + (0.0 if offset is None else offset.float())
        v, phi, precision = loadings.float(), self.features, (1 / prior.clamp_min(1e-12)).float()
        squares = phi.square().sum(0)[:, None]

        def objective(w: Tensor) -> tuple[float, Tensor]:
            eta = shift + (phi @ w) @ v.T
            return float(self.likelihood(eta, values)) + float((precision * w.square()).sum() / 2), eta

        w = start.float()
        best, eta = objective(w)
        for _ in range(steps):
            slope = _slope(self.likelihood, eta, values)
            weight = self.likelihood.information(eta).expand_as(eta)
            gradient = phi.T @ (slope @ v) + precision * w
            diagonal = precision + squares * (weight.mean(0) @ v.square())

            def curvature(x: Tensor, weight=weight) -> Tensor:
                return phi.T @ ((weight * ((phi @ x) @ v.T)) @ v) + precision * x

            move, length = conjugate_gradients(curvature, -gradient, diagonal), 1.0
            now, new_eta = objective(w + move)
            while not now < best and length > 1e-3:
                length /= 2
                now, new_eta = objective(w + length * move)
            if not now < best:
                break
            gain, best, w, eta = best - now, now, w + length * move, new_eta
            if gain < 1e-6 * abs(best):
                break
        return w


def _slope(likelihood: Likelihood, eta: Tensor, values: Tensor) -> Tensor:
    """Derivative of the negative log-likelihood by each predictor."""
    with torch.enable_grad():
        eta = eta.detach().requires_grad_()
        return torch.autograd.grad(likelihood(eta, values), eta)[0]


def conjugate_gradients(matrix, right: Tensor, diagonal: Tensor, *, most: int = 20, tolerance: float = 1e-3) -> Tensor:
    """An approximate solution x of ``matrix(x) = right`` for a symmetric positive matrix, preconditioned by its `diagonal`."""
    x, residual = torch.zeros_like(right), right
    direction = scaled = residual / diagonal
    size = first = (residual * scaled).sum()
    for _ in range(most):
        if not size > tolerance**2 * first:
            break
        image = matrix(direction)
        step = size / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        scaled = residual / diagonal
        size, last = (residual * scaled).sum(), size
        direction = scaled + size / last * direction
    return x


def spectral_variance(network: Cosine, d: int, length: float) -> Tensor:  # -> (m,)
    r"""Variance of each coefficient of a unit-variance process with a Matern-3/2 kernel of a length in box units.

    It is the spectral density :math:`S(\omega) = 2^d \pi^{d/2} \frac{\Gamma(\nu + d/2)}{\Gamma(\nu)} \kappa^{2\nu} (\kappa^2 + \omega^2)^{-\nu - d/2}`
    with :math:`\nu = 3/2`, :math:`\kappa = \sqrt{3} / \ell`, divided by the squared norm of the function :cite:p:`Solin2020`.
    """
    nu, kappa = 1.5, math.sqrt(3) / length
    scale = 2**d * math.pi ** (d / 2) * math.gamma(nu + d / 2) / math.gamma(nu) * kappa ** (2 * nu)
    density = scale * (kappa**2 + network.squared_frequencies(d)) ** (-nu - d / 2)
    return density / network.squared_norms(d)


def learn_process(
    data: SpotData, directions: NDArray, box: Box, *, lengths: tuple[float, ...], functions: int, margin: float
) -> LatentProcess:
    """The Gaussian processes of the channels that start from `directions` (G, r), by marginal likelihood.

    Parameters
    ----------
    data
        Spots and genes; every gene must be informative.
    directions
        (G, r) singular vectors of standardised residuals.
    box
        Unit box of the coordinates.
    lengths
        Candidates for the length, in pitches: the d-th root of the volume of the bounding box for each spot.
    functions
        Number m of functions of the series, at most.
    margin
        As in :class:`neurst.core.nets.Cosine`.
    """
    n, d = data.coords.shape
    x = box.to_unit(torch.from_numpy(data.coords))
    network = cosine_series(x, functions, margin)
    features = features_at(network, x)
    rate = data.mean_rate()
    likelihood = data.observation.likelihood(data.values)
    likelihood.requires_grad_(False)
    offset = data.observation.offset()
    eta = torch.from_numpy(data.observation.intercept(rate)).float() + (0.0 if offset is None else offset.float())
    eta = eta.expand(n, len(rate))
    values = torch.from_numpy(dense(data.values)).float()
    weight = likelihood.information(eta).expand_as(eta)
    by_gene = weight.mean(0)
    precision = (weight.sum(1) / by_gene.sum()).double()  # (N,) mean 1
    loadings = torch.from_numpy(directions) / by_gene.double().sqrt()[:, None]
    score = -(_slope(likelihood, eta, values).double() @ loadings)  # (N, r)
    phi = features.double()
    gram, right = phi.T @ (precision[:, None] * phi), phi.T @ score
    total = (score.square() / precision[:, None]).sum(0)
    extent = (x.amax(0) - x.amin(0)).clamp_min(1e-3)
    pitch = float(extent.prod() / n) ** (1 / d)
    best = torch.full((len(total),), torch.inf, dtype=torch.float64)
    found = {name: torch.zeros(len(total), dtype=torch.float64) for name in ("length", "variance", "noise")}
    coefficients, axes = torch.zeros_like(right), {}
    for length in lengths:
        root = spectral_variance(network, d, length * pitch).sqrt()
        size, frame = torch.linalg.eigh(root[:, None] * gram * root)
        size, frame = size.clamp_min(0), root[:, None] * frame
        axes[length * pitch] = (frame.numpy(), size.numpy())
        part = frame.T @ right  # (m, r)
        for ratio in RATIOS:
            shrink = ratio / (1 + ratio * size)  # posterior variance of each direction over the noise
            noise = ((total - (shrink[:, None] * part.square()).sum(0)) / n).clamp_min(1e-12)
            loss = n * noise.log() + torch.log1p(ratio * size).sum()
            better = loss < best
            if not better.any():
                continue
            best = torch.where(better, loss, best)
            for name, value in (("length", length * pitch), ("variance", ratio), ("noise", noise)):
                found[name] = torch.where(better, torch.as_tensor(value, dtype=torch.float64), found[name])
            coefficients[:, better] = frame @ (shrink[:, None] * part[:, better])
    return LatentProcess(
        data,
        box,
        network,
        features,
        precision,
        likelihood,
        loadings.numpy(),
        coefficients,
        found["length"].numpy(),
        found["variance"].numpy(),
        found["noise"].numpy(),
        {length: axes[length] for length in set(found["length"].tolist())},
    )


def cosine_series(x: Tensor, functions: int, margin: float) -> Cosine:
    """The series of at most `functions` functions that covers points (N, d) in box units."""
    sides = tuple(round(float(side), 3) for side in x.abs().amax(0).clamp(0.0, 1.0))
    waves = 2
    while math.prod(Cosine(waves + 1, sides, margin).sizes(len(sides))) <= functions:
        waves += 1
    return Cosine(waves, sides, margin)


def features_at(network: Cosine, x: Tensor) -> Tensor:  # (N, d) -> (N, m) float32
    """The functions of the series at box coordinates."""
    factors = network.build(x.shape[1], 1, torch.Generator()).factors
    out = factors[0](x[:, :1])
    for i, factor in enumerate(factors[1:], start=1):
        out = (out[:, :, None] * factor(x[:, i : i + 1])[:, None, :]).flatten(1)
    return out.float()
