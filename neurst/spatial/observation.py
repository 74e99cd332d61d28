r"""What was measured at spots, and how it depends on a predictor: counts, or normalised values.

An observation model holds everything that depends on the kind of values: offset, mean rate, residuals, head, link, likelihood, loss, score,
over-dispersion. A new kind of values needs a new class here. Letters: N spots, G genes, r latent channels.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurst.core.heads import Loadings
from neurst.core.jet import Jet
from neurst.core.likelihood import Gaussian, Likelihood, NegativeBinomial, Poisson
from neurst.spatial.evaluate import scores
from neurst.spatial.evaluate.baselines import COUNT_BASELINES, VALUE_BASELINES, log_normalised
from neurst.spatial.evaluate.calibration import over_dispersion
from neurst.spatial.loadings import count_loadings, gaussian_loadings, singular_directions
from neurst.spatial.matrix import Matrix, column_means, dense, moments

START_DISPERSION = 10.0  # theta of a negative binomial before the fit


class Link(ABC):
    """The inverse link of a field: it maps the predictor, and its standard deviation, to the expected expression."""

    name: ClassVar[str]

    @abstractmethod
    def mean(self, eta: Tensor | Jet) -> Tensor | Jet:
        """Expected expression at a predictor."""

    @abstractmethod
    def spread(self, eta: NDArray, sd: NDArray) -> NDArray:
        """Standard deviation of the expected expression at a predictor with standard deviation `sd`."""

    @abstractmethod
    def slope(self, eta: NDArray) -> NDArray:
        """Derivative of the expected expression by the predictor; for counts it is also the Fisher information of a count."""


@dataclass(frozen=True)
class LogLink(Link):
    """Expected counts of a spot with library size `target_sum`: ``target_sum exp(eta)``."""

    target_sum: float
    name: ClassVar[str] = "log"

    def mean(self, eta: Tensor | Jet) -> Tensor | Jet:
        return torch.exp(eta) * self.target_sum

    def spread(self, eta: NDArray, sd: NDArray) -> NDArray:
        return sd * self.target_sum * np.exp(eta)

    def slope(self, eta: NDArray) -> NDArray:
        return self.target_sum * np.exp(eta)


@dataclass(frozen=True)
class IdentityLink(Link):
    """Expected values in the units of the data: the predictor itself."""

    target_sum: float = 1.0
    name: ClassVar[str] = "identity"

    def mean(self, eta: Tensor | Jet) -> Tensor | Jet:
        return eta

    def spread(self, eta: NDArray, sd: NDArray) -> NDArray:
        return sd

    def slope(self, eta: NDArray) -> NDArray:
        return np.ones_like(eta)


LINKS: dict[str, type[Link]] = {link.name: link for link in (LogLink, IdentityLink)}


class Observation(ABC):
    """How values (N, G) at spots depend on a predictor."""

    kind: ClassVar[str]  # name of the kind of values in messages
    score_name: ClassVar[str]  # name of the held-out score
    has_dispersion: ClassVar[bool]  # whether values can be over-dispersed about their mean
    refit_factor: ClassVar[float]  # strength of the final fits, relative to the one at which trials score best
    baselines: ClassVar[Mapping[str, Callable]]  # simple methods by name: (train, test) -> predictions (M, G)
    variants: ClassVar[tuple[str, ...]] = ("no_tv",)  # variants of the field that it can be compared with

    @abstractmethod
    def take(self, spots: NDArray) -> Observation:
        """The model of some spots, given by their indices."""

    @abstractmethod
    def offset(self) -> Tensor | None:
        """(N, 1) known part of the predictor, such as the log library size."""

    @abstractmethod
    def mean_rate(self, values: Matrix) -> NDArray:
        """(G,) expected rate or value of each gene if position does not matter: the null model."""

    @abstractmethod
    def intercept(self, rate: NDArray) -> NDArray:
        """(G,) predictors of mean rates."""

    @abstractmethod
    def informative_genes(self, values: Matrix) -> NDArray:
        """Indices of the genes that can be fitted."""

    @abstractmethod
    def variability(self, values: Matrix) -> NDArray:
        """(G,) variability, by which the most variable genes are chosen."""

    @abstractmethod
    def gene_unit(self, values: Matrix) -> NDArray | float:
        """(G,) the unit in which the predictors of genes are compared."""

    @abstractmethod
    def gene_information(self, values: Matrix) -> NDArray:
        """(G,) Fisher information of all values of a gene about its intercept."""

    @abstractmethod
    def directions(self, values: Matrix, rank: int, random_state: int) -> NDArray:
        """(G, r) starting values of the loadings: leading singular vectors of standardised residuals from the null model."""

    @abstractmethod
    def head(self, values: Matrix, directions: NDArray) -> Loadings:
        """The map from latents to predictors, with its starting values."""

    @abstractmethod
    def likelihood(self, values: Matrix) -> Likelihood:
        """The data term, with its starting values."""

    @abstractmethod
    def solve_loadings(self, latent: NDArray, values: Matrix, fitted: Likelihood) -> tuple[NDArray, NDArray]:
        """Loadings (G, r) and intercepts (G,) of further genes on the latents (N, r) of a fit with the likelihood `fitted`."""

    @abstractmethod
    def prediction(self, eta: NDArray) -> NDArray:
        """(N, G) predicted rates or values, without the offset."""

    @abstractmethod
    def balance(self, rate: NDArray, eta: NDArray) -> NDArray:
        """(G,) what is added to predictors (N, G), so that their mean rates over the spots are `rate` (G,).

        For counts, these are totals over spots divided by the total of the library sizes. A rate of 0 is taken for 1e-300.
        """

    @abstractmethod
    def loss(self, values: Matrix, eta: NDArray) -> tuple[float, NDArray]:
        """Negative log-likelihood of held-out values at predictors (N, G), up to a constant, and its derivative by each predictor (N, G)."""

    @abstractmethod
    def residuals(self, values: Matrix, eta: NDArray, scatter: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Residuals of values at predictors, their variance, and the derivative of the mean by the predictor, (N, G) each.

        `scatter` (G,) is the over-dispersion of counts, or the variance of the noise of normalised values.
        """

    @abstractmethod
    def cautious_variance(self, residual: NDArray, variance: NDArray, slope: NDArray) -> NDArray:
        """(N, G) variance half-way between a prediction and a value above it.

        Counts are skewed: with the variance at a small expected count, a single count would be a large deviation.
        """

    @abstractmethod
    def score(self, values: Matrix, prediction: NDArray, rate: NDArray) -> float:
        """Share of the deviance (or variance) from the mean rates (G,) of the training spots that a prediction explains, over all genes."""

    @abstractmethod
    def gene_scores(self, values: Matrix, prediction: NDArray, rate: NDArray) -> NDArray:
        """(G,) the same share for each gene."""

    @abstractmethod
    def correlation(self, values: Matrix, prediction: NDArray) -> float:
        """Median over genes of the correlation between prediction and value."""

    @abstractmethod
    def dispersion(self, values: Matrix, prediction: NDArray) -> NDArray | None:
        """(G,) over-dispersion of held-out counts about a prediction; None for values other than counts."""

    @abstractmethod
    def target_sum(self) -> float:
        """The library size that expected counts refer to; 1 for values other than counts."""

    @abstractmethod
    def link(self, target_sum: float) -> Link:
        """The link of a field of these values."""

    @abstractmethod
    def normalised(self, values: Matrix) -> Matrix:
        """(N, G) the values as normalised data, to which a Gaussian likelihood can be fitted."""


@dataclass(frozen=True, eq=False)
class Counts(Observation):
    r"""Counts of mean :math:`t_i \exp(\eta_{ig})`, where t is the library size.

    Trials have fewer spots and fewer steps than the final fits, and early stopping also regularises. So the final fits use 1.5 times the
    strength at which trials score best; a prior that is too weak does more harm than one that is too strong.

    Parameters
    ----------
    size
        (N,) library sizes > 0.
    noise
        ``"poisson"``, or ``"negative_binomial"`` with a dispersion for each gene.
    """

    size: NDArray
    noise: Literal["poisson", "negative_binomial"] = "poisson"
    kind: ClassVar[str] = "counts"
    score_name: ClassVar[str] = "deviance_explained"
    has_dispersion: ClassVar[bool] = True
    refit_factor: ClassVar[float] = 1.5
    baselines: ClassVar[Mapping[str, Callable]] = COUNT_BASELINES
    variants: ClassVar[tuple[str, ...]] = ("no_tv", "lognorm")

    def take(self, spots: NDArray) -> Counts:
        return dataclasses.replace(self, size=self.size[spots])

    def offset(self) -> Tensor:
        return torch.from_numpy(np.log(self.size))[:, None]

    def mean_rate(self, values: Matrix) -> NDArray:
        return column_means(values) * (len(self.size) / self.size.sum())

    def intercept(self, rate: NDArray) -> NDArray:
        with np.errstate(divide="ignore"):  # log 0 = -inf: the expected count of a gene without counts is 0 everywhere
            return np.log(rate)

    def informative_genes(self, values: Matrix) -> NDArray:
        return np.flatnonzero(column_means(values) > 0)

    def variability(self, values: Matrix) -> NDArray:
        mean, sd = moments(values)
        return sd**2 / mean

    def gene_unit(self, values: Matrix) -> float:
        return 1.0

    def gene_information(self, values: Matrix) -> NDArray:
        return column_means(values) * values.shape[0]

    def directions(self, values: Matrix, rank: int, random_state: int) -> NDArray:
        r"""Singular vectors of Pearson residuals :math:`(y_{ig} - t_i p_g) / \sqrt{t_i p_g}` :cite:p:`Lause2021`."""
        rate = self.mean_rate(values)
        scales = 1 / np.sqrt(self.size), 1 / np.sqrt(rate)
        return singular_directions(values, (self.size, rate), scales, rank, random_state)

    def head(self, values: Matrix, directions: NDArray) -> Loadings:
        weight = torch.from_numpy(np.ascontiguousarray(directions))
        return Loadings(weight, torch.from_numpy(self.mean_rate(values)).log())

    def likelihood(self, values: Matrix) -> Likelihood:
        if self.noise == "poisson":
            return Poisson()
        return NegativeBinomial(torch.full((values.shape[1],), START_DISPERSION))

    def solve_loadings(self, latent: NDArray, values: Matrix, fitted: Likelihood) -> tuple[NDArray, NDArray]:
        phi = None
        if isinstance(fitted, NegativeBinomial):  # the median dispersion of the genes in the fit
            phi = np.full(values.shape[1], float(torch.exp(-fitted.log_dispersion.detach()).median()))
        return count_loadings(latent, values, self.size, self.mean_rate(values), phi)

    def prediction(self, eta: NDArray) -> NDArray:
        return np.exp(eta)

    def balance(self, rate: NDArray, eta: NDArray) -> NDArray:
        return np.log(np.maximum(rate, 1e-300)) - np.log(self.size @ np.exp(eta) / self.size.sum())

    def loss(self, values: Matrix, eta: NDArray) -> tuple[float, NDArray]:
        values, mean = dense(values), self.size[:, None] * np.exp(eta)
        return float((mean - values * eta).sum()), mean - values

    def residuals(self, values: Matrix, eta: NDArray, scatter: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        mean = self.size[:, None] * np.exp(eta)
        return dense(values) - mean, mean * (1 + scatter * mean), mean

    def cautious_variance(self, residual: NDArray, variance: NDArray, slope: NDArray) -> NDArray:
        return variance * (1 + np.maximum(residual, 0.0) / (2 * slope))

    def score(self, values: Matrix, prediction: NDArray, rate: NDArray) -> float:
        return scores.deviance_explained(values, self.size, prediction, rate)

    def gene_scores(self, values: Matrix, prediction: NDArray, rate: NDArray) -> NDArray:
        return scores.deviance_explained_per_gene(values, self.size, prediction, rate)

    def correlation(self, values: Matrix, prediction: NDArray) -> float:
        return scores.median_log_rate_correlation(values, self.size, prediction)

    def dispersion(self, values: Matrix, prediction: NDArray) -> NDArray:
        return over_dispersion(values, self.size[:, None] * prediction)

    def target_sum(self) -> float:
        return float(np.median(self.size))

    def link(self, target_sum: float) -> LogLink:
        return LogLink(target_sum)

    def normalised(self, values: Matrix) -> Matrix:
        return log_normalised(values, self.size)


@dataclass(frozen=True, eq=False)
class Normalised(Observation):
    """Values with Gaussian noise about the predictor, one standard deviation for each gene.

    The final fits use the strength at which trials score best: with a somewhat larger one, all components may shrink to zero.
    """

    kind: ClassVar[str] = "normalised values"
    score_name: ClassVar[str] = "variance_explained"
    has_dispersion: ClassVar[bool] = False
    refit_factor: ClassVar[float] = 1.0
    baselines: ClassVar[Mapping[str, Callable]] = VALUE_BASELINES

    def take(self, spots: NDArray) -> Normalised:
        return self

    def offset(self) -> None:
        return None

    def mean_rate(self, values: Matrix) -> NDArray:
        return column_means(values)

    def intercept(self, rate: NDArray) -> NDArray:
        return rate

    def informative_genes(self, values: Matrix) -> NDArray:
        mean, sd = moments(values)
        return np.flatnonzero(sd > 1e-6 * np.abs(mean))  # more than float32 rounding

    def variability(self, values: Matrix) -> NDArray:
        return moments(values)[1]

    def gene_unit(self, values: Matrix) -> NDArray:
        return moments(values)[1]

    def gene_information(self, values: Matrix) -> NDArray:
        return values.shape[0] / np.maximum(moments(values)[1] ** 2, 1e-300)

    def directions(self, values: Matrix, rank: int, random_state: int) -> NDArray:
        """Singular vectors of standard scores :math:`(y_{ig} - m_g) / s_g`."""
        mean, sd = moments(values)
        ones = np.ones(values.shape[0])
        return singular_directions(values, (ones, mean), (ones, 1 / sd), rank, random_state)

    def head(self, values: Matrix, directions: NDArray) -> Loadings:
        mean, sd = (torch.from_numpy(part) for part in moments(values))
        return Loadings(torch.from_numpy(np.ascontiguousarray(directions)), mean / sd, sd)

    def likelihood(self, values: Matrix) -> Likelihood:
        return Gaussian(torch.from_numpy(moments(values)[1]), learned=True)

    def solve_loadings(self, latent: NDArray, values: Matrix, fitted: Likelihood) -> tuple[NDArray, NDArray]:
        return gaussian_loadings(latent, values)

    def prediction(self, eta: NDArray) -> NDArray:
        return eta

    def balance(self, rate: NDArray, eta: NDArray) -> NDArray:
        return rate - eta.mean(0)

    def loss(self, values: Matrix, eta: NDArray) -> tuple[float, NDArray]:
        sd = moments(values)[1]
        error = np.where(sd > 0, (eta - dense(values)) / np.where(sd > 0, sd, 1.0), 0.0)
        return float((error**2).sum() / 2), error / np.where(sd > 0, sd, 1.0)

    def residuals(self, values: Matrix, eta: NDArray, scatter: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        error = dense(values) - eta
        return error, np.broadcast_to(scatter, error.shape), np.ones_like(error)

    def cautious_variance(self, residual: NDArray, variance: NDArray, slope: NDArray) -> NDArray:
        return variance

    def score(self, values: Matrix, prediction: NDArray, rate: NDArray) -> float:
        return scores.variance_explained(values, prediction, rate)

    def gene_scores(self, values: Matrix, prediction: NDArray, rate: NDArray) -> NDArray:
        return scores.variance_explained_per_gene(values, prediction, rate)

    def correlation(self, values: Matrix, prediction: NDArray) -> float:
        return scores.median_gene_correlation(values, prediction)

    def dispersion(self, values: Matrix, prediction: NDArray) -> None:
        return None

    def target_sum(self) -> float:
        return 1.0

    def link(self, target_sum: float) -> IdentityLink:
        return IdentityLink()

    def normalised(self, values: Matrix) -> Matrix:
        return values
