r"""How uncertain an expression field is at any point: the posterior variance of a Gaussian process.

With the latent channels and loadings of :mod:`neurst.spatial.gaussian_process`, the variance of the predictor of gene g is

.. math::
    s_g^2(x) = c \Big( \sum_c V_{gc}^2\, v_c(x) + z(x)^\top \Sigma_g z(x) + 1 / I_g \Big).

:math:`v_c` is the posterior variance of channel c, which grows with the distance to the spots; :math:`\Sigma_g` is the posterior covariance of
the loadings of the gene, of which a gene has :math:`I_g` (its Fisher information, for counts their number); the last term is the variance of its
intercept. The factor c was chosen on synthetic sections, whose rates are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurst.core.field import finite_array, positive_number
from neurst.core.nets import NETWORKS, Cosine
from neurst.spatial.gaussian_process import LatentProcess, features_at, spectral_variance

CERTAIN = 1e30  # information about a gene that does not vary
# The average of several members errs less than the process alone. This share of the posterior variance covers its errors best on
# synthetic sections (seeds 10 to 12), whose rates are known.
SCALE = 0.93
# directions of the series in which data tell less than this, relative to the prior, are left out
LEAST_INFORMATION = 0.02


@dataclass(frozen=True, eq=False)
class Spread:
    """The variance of the predictor of each gene, from the posterior of a Gaussian process.

    Parameters
    ----------
    network
        The cosine series.
    coefficients
        (m, r) coefficients of the channels.
    lengths
        (L,) lengths of the kernels, in box units.
    channels
        (L, r) True where a channel has this length.
    frames
        For each length (m, K): directions of the series that the spots inform about.
    informed
        For each length (K, r): share of the prior variance in these directions that the spots remove, 0 for channels of another length.
    variance
        (r,) prior variance of each channel.
    loadings
        (G, r).
    axes, information
        Principal axes (r, r) of the latent channels at the spots, as columns, and the mean square (r,) along them.
    gene_information, gene_unit
        (G,) :math:`I_g`, and the unit in which the prior of the loadings is a standard normal distribution.
    scale
        The factor c.
    """

    network: Cosine
    coefficients: NDArray
    lengths: NDArray
    channels: NDArray
    frames: tuple[NDArray, ...]
    informed: tuple[NDArray, ...]
    variance: NDArray
    loadings: NDArray
    axes: NDArray
    information: NDArray
    gene_information: NDArray
    gene_unit: NDArray
    scale: float = SCALE

    def among(self, n_genes: int, index: NDArray) -> Spread:
        """The same among G genes, where these genes have the indices `index`. The others, which do not vary, have no variance."""
        loadings, information = np.zeros((n_genes, self.loadings.shape[1])), np.full(n_genes, CERTAIN)
        unit = np.ones(n_genes)
        loadings[index], information[index], unit[index] = self.loadings, self.gene_information, self.gene_unit
        return dataclasses.replace(self, loadings=loadings, gene_information=information, gene_unit=unit)

    def select(self, index: NDArray) -> Spread:
        """The same for some genes, given by their indices."""
        by_gene = {name: getattr(self, name)[index] for name in ("loadings", "gene_information", "gene_unit")}
        return dataclasses.replace(self, **by_gene)

    def predictor_variance(self, x: Tensor) -> NDArray:  # (N, d) -> (N, G)
        """Variance of the predictors at box coordinates."""
        features, single = features_at(self.network, x).numpy(), np.float32  # single precision serves a variance
        channel = np.zeros((len(x), len(self.variance)), dtype=single)
        lengths = zip(self.lengths, self.channels, self.frames, self.informed, strict=True)
        for length, chosen, frame, informed in lengths:
            prior = spectral_variance(self.network, x.shape[1], float(length)).float().numpy()
            explained = (features @ frame.astype(single)) ** 2 @ informed.astype(single)
            channel += chosen * (features**2 @ prior)[:, None] - explained
        channel = np.maximum(channel, 0.0) * self.variance
        along = (features @ self.coefficients @ self.axes) ** 2
        loading = 1 / (self.gene_unit**-2.0 + np.outer(self.information, self.gene_information))
        return self.scale * (channel @ self.loadings.T**2 + along @ loading + 1 / self.gene_information)

    def to_dict(self) -> dict[str, Any]:
        """Plain arrays."""
        by_length, apart = ("frames", "informed"), ("network",)
        whole = [each.name for each in dataclasses.fields(self) if each.name not in by_length + apart]
        parts = {f"{name}_{k}": part for name in by_length for k, part in enumerate(getattr(self, name))}
        arrays = {name: getattr(self, name) for name in whole} | parts
        return {"network": NETWORKS.to_dict(self.network)} | {
            name: part.astype(np.float32) if isinstance(part, np.ndarray) and part.dtype == np.float64 else part
            for name, part in arrays.items()
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], d: int, n_genes: int) -> Spread:
        """The inverse of :meth:`to_dict`, for a field of d coordinates and G genes."""
        network = NETWORKS.from_dict(stored["network"])
        if not isinstance(network, Cosine):
            msg = f"the network of the spread is {network!r}, expected a Cosine"
            raise TypeError(msg)
        lengths = finite_array(stored, "lengths", np.size(stored["lengths"]), dtype=np.float64)
        r, m = np.size(stored["variance"]), network.n_weights(d, 1)
        shapes = {
            "coefficients": (m, r),
            "variance": (r,),
            "loadings": (n_genes, r),
            "axes": (r, r),
            "information": (r,),
        }
        arrays = {
            k: finite_array(stored, k, *shape, dtype=np.float64)
            for k, shape in (shapes | {"gene_information": (n_genes,), "gene_unit": (n_genes,)}).items()
        }
        frames, informed = [], []
        for k in range(len(lengths)):
            frame = finite_array(stored, f"frames_{k}", dtype=np.float64)
            frames.append(frame.reshape(m, -1))
            informed.append(finite_array(stored, f"informed_{k}", frames[-1].shape[1], r, dtype=np.float64))
        channels = np.asarray(stored["channels"], dtype=bool).reshape(len(lengths), r)
        if any(np.any(each <= 0) for each in (arrays["gene_information"], arrays["gene_unit"], lengths)):
            msg = "gene_information, gene_unit and lengths are not all positive"
            raise ValueError(msg)
        return cls(
            network=network,
            lengths=lengths,
            channels=channels,
            frames=tuple(frames),
            informed=tuple(informed),
            scale=positive_number(stored, "scale"),
            **arrays,
        )


def posterior_spread(
    process: LatentProcess, net: torch.nn.Module, loadings: NDArray, gene_information: NDArray, gene_unit: NDArray
) -> Spread:
    """The spread of a process fitted with strength 1, whose network is `net`, for loadings (G, r) of genes with the given information (G,) and unit (G,)."""
    unit, distinct = process.unit(1.0), np.unique(process.lengths)
    frames, informed = [], []
    for length in distinct:
        frame, size = process.axes[float(length)]
        signal = size[:, None] * process.variance  # (m, r) information relative to the prior
        share = np.where(process.lengths == length, signal / (1 + signal), 0.0)
        kept = share.max(1) > LEAST_INFORMATION
        frames.append(frame[:, kept])
        informed.append(share[kept])
    coefficients = net.core.detach().double().flatten(0, -2).numpy()
    latent = process.features.double().numpy() @ coefficients
    weight = process.precision.numpy()
    information, axes = np.linalg.eigh(latent.T @ (weight[:, None] * latent) / weight.sum())
    return Spread(
        network=process.network,
        coefficients=coefficients,
        lengths=distinct,
        channels=process.lengths == distinct[:, None],
        frames=tuple(frames),
        informed=tuple(informed),
        variance=process.variance * process.noise * unit**2,
        loadings=loadings,
        axes=axes,
        information=np.maximum(information, 0.0),
        gene_information=gene_information,
        gene_unit=gene_unit,
    )
