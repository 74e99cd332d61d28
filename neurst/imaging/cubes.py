r"""Hyperspectral cubes with mixed noise: Gaussian noise, impulses, stripes and dead lines at once.

The model of a cube Y is :math:`Y = X + S + \mathrm{noise}`, with the clean cube X and sparse errors S. A scene has far fewer materials than a
cube has bands, so :math:`X = m + z V^\top` with few latent maps z. Errors of single entries or whole lines do not fit the spectra of the
materials: S is the large part of the residuals after a robust regression on V. The maps are then fitted by a field over the plane, regularised
by NeurTV :cite:p:`Luo2025`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from neurst.core.arguments import (
    ANYTHING,
    AUTO,
    NONE,
    POSITIVE,
    SIZE,
    check_fields,
    checked,
    instance,
    real_array,
    several,
)
from neurst.core.fit import FitConfig, fit_field
from neurst.core.heads import Affine
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian
from neurst.core.nets import LowRank, Network
from neurst.core.penalty import Penalty
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.samples import Samples
from neurst.core.tuning import LineSearch
from neurst.imaging.arrays import MAD_OF_NORMAL, MIN_SIDE
from neurst.imaging.options import OPTIONS, FitOptions
from neurst.imaging.pixels import ImageConfig, nats, pixel_penalty, pixel_spline


@dataclass(frozen=True)
class CubeConfig:
    """Numbers of the fit of a cube.

    Parameters
    ----------
    tau_in_noise
        Threshold of sparse errors where ``tau=None``, in units of the noise of each band.
    line
        Number of standard errors by which the median of a line must differ from zero to count as an offset of the whole line.
    least_noise, least_of_median
        Smallest noise estimate of a band where ``sigma=None``, as a share of the typical spread of a band, and of the median noise of all bands.
        Details of a scene that a few materials do not describe count as noise, so no band is free of it.
    rank_margin, extra_rank
        A component counts if its variance exceeds the largest one of pure noise by the factor `rank_margin`. `extra_rank` more components are
        kept; the penalty removes their noise.
    start_rounds
        Rounds in which the low-rank part and the sparse part are estimated in turn.
    huber, huber_rounds
        Threshold of the robust regression in units of the noise, and number of its Newton steps.
    map_strength, cube_strength
        Prior strength where ``lam="auto"``, in nats for each entry, for latent maps and for a whole cube (:class:`neurst.core.penalty.MixedTV`).
    map_rate, map_steps, map_refresh
        For latent maps: learning rate at the first step, Adam steps, and steps between refreshes.
    cube_rate, cube_steps, cube_regularisation, cube_omega
        For a whole cube: learning rate at the first step, Adam steps, regularisation points, and frequency of the low-rank network.
    """

    tau_in_noise: float = 2.5
    line: float = 4.0
    least_noise: float = 0.2
    least_of_median: float = 0.3
    rank_margin: float = 1.5
    extra_rank: int = 2
    start_rounds: int = 8
    huber: float = 1.0
    huber_rounds: int = 10
    map_strength: float = 0.55
    cube_strength: float = 0.5
    map_rate: float = 0.3
    map_steps: int = 200
    map_refresh: int = 25
    cube_rate: float = 3e-3
    cube_steps: int = 800
    cube_regularisation: int = 60_000
    cube_omega: float = 20.0

    def __post_init__(self):
        check_fields(self)


class DenoisedCube(NamedTuple):
    """A clean cube and its sparse errors. The residual ``cube - clean - sparse`` is at most `tau` everywhere."""

    clean: np.ndarray  # (H, W, B)
    sparse: np.ndarray  # (H, W, B): impulses, stripes, dead lines


@dataclass(frozen=True)
class SparseRule:
    r"""The rule for sparse errors S in residuals R, both in units of the noise: :math:`S = c + T_\tau(R - c)`.

    c holds the offsets of whole columns and rows of a band: the median of a line if it differs from zero by more than `line` standard errors
    (:math:`\sqrt{\pi / 2n}` for the median of n normal values), else 0. :math:`T_\tau(t) = t` if :math:`|t| > \tau`, else 0.

    Parameters
    ----------
    tau
        (B,) thresholds in units of the noise.
    line
        Number of standard errors.
    """

    tau: np.ndarray
    line: float = 4.0

    def lines(self, residual: np.ndarray) -> np.ndarray:  # (H, W, B) -> (H, W, B)
        """c, the offsets of lines."""
        out = np.zeros_like(residual)
        for axis in (0, 1):
            middle = np.median(residual - out, axis=axis, keepdims=True)
            error = math.sqrt(math.pi / 2 / residual.shape[axis])
            out += np.where(np.abs(middle) > self.line * error, middle, 0)
        return out

    def __call__(self, residual: np.ndarray) -> np.ndarray:  # (H, W, B) -> (H, W, B)
        """S, the sparse errors."""
        offset = self.lines(residual)
        rest = residual - offset
        return offset + np.where(np.abs(rest) > self.tau, rest, 0)


@dataclass(frozen=True, eq=False)
class Subspace:
    """The spectra ``mean + z V'`` with few latent coordinates z and an orthonormal basis V."""

    mean: np.ndarray  # (B,)
    basis: np.ndarray  # (B, r)

    @classmethod
    def of(cls, spectra: np.ndarray, rank: int) -> Subspace:
        """The subspace of the leading principal directions of spectra (..., B)."""
        mean, basis, _ = _principal(spectra)
        return cls(mean, basis[:, :rank])

    def to_latent(self, spectra: np.ndarray) -> np.ndarray:  # (..., B) -> (..., r)
        """Coordinates z of the spectra in the subspace that are nearest to given ones."""
        return (spectra - self.mean) @ self.basis

    def to_spectra(self, z: np.ndarray) -> np.ndarray:  # (..., r) -> (..., B)
        """Spectra with the coordinates z."""
        return z @ self.basis.T + self.mean


def _principal(spectra: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, principal directions (columns) and variances along them, largest first."""
    flat = spectra.reshape(-1, spectra.shape[-1])
    mean = flat.mean(0)
    centred = flat - mean
    size, basis = np.linalg.eigh((centred.T @ centred).astype(float) / len(flat))
    # choose signs that do not depend on the order of the bands
    basis = basis * np.where((basis**3).sum(0) < 0, -1, 1)
    return mean, basis[:, ::-1].astype(spectra.dtype), size[::-1]


def _rank_beyond_noise(variances: np.ndarray, n: int, margin: float) -> int:
    r"""Number of components with variance above `margin` times the largest of pure noise of unit variance, :math:`(1 + \sqrt{B / n})^2`."""
    return max(1, int((variances > margin * (1 + math.sqrt(len(variances) / n)) ** 2).sum()))


def _mad(residual: np.ndarray) -> np.ndarray:  # (H, W, B) -> (B,)
    return np.median(np.abs(residual), axis=(0, 1)) / MAD_OF_NORMAL


def _start(
    y: np.ndarray, sigma: np.ndarray | None, tau: np.ndarray | None, config: CubeConfig
) -> tuple[np.ndarray, SparseRule, np.ndarray, int]:
    """Noise of each band (B,), the rule, a first S in units of the noise, and the number of components above the noise.

    The low-rank part and the sparse part are estimated in turn, starting from 3 x 3 medians. The noise is the median absolute residual,
    corrected for the share ``|V_b|^2`` of its variance that the subspace fits.
    """
    from scipy.ndimage import median_filter  # slow to import

    n, n_bands = y.shape[0] * y.shape[1], y.shape[2]
    spread = float(np.median(_mad(y - np.median(y, axis=(0, 1)))))
    residual = y - median_filter(y, (3, 3, 1))
    noise = _floored(_mad(residual), spread, config) if sigma is None else sigma
    rule = SparseRule(config.tau_in_noise * np.ones_like(noise) if tau is None else tau / noise, config.line)
    sparse = noise * rule(residual / noise)
    for _ in range(config.start_rounds):
        white = (y - sparse) / noise
        mean, basis, variances = _principal(white)
        rank = min(_rank_beyond_noise(variances, n, config.rank_margin), max(1, n_bands // 2))
        space = Subspace(mean, basis[:, :rank])
        residual = y - noise * space.to_spectra(space.to_latent(white))
        if sigma is None:
            kept = 1 - np.minimum((space.basis**2).sum(1), 0.8)
            noise = _floored(_mad(residual - noise * rule.lines(residual / noise)) / np.sqrt(kept), spread, config)
        rule = SparseRule(rule.tau if tau is None else tau / noise, config.line)
        sparse = noise * rule(residual / noise)
    return noise, rule, sparse / noise, rank


def _floored(noise: np.ndarray, spread: float, config: CubeConfig) -> np.ndarray:
    """The noise of each band, raised to a smallest value. A band without noise would have infinite weight."""
    least = max(config.least_of_median * float(np.median(noise)), config.least_noise * spread, 1e-6)
    return np.maximum(noise, least)


def _regressed(
    white: np.ndarray, sparse: np.ndarray, space: Subspace, rule: SparseRule, config: CubeConfig
) -> np.ndarray:
    r"""The S that remains after Huber's robust regression of each pixel on the subspace.

    Newton steps :math:`z \leftarrow z + V^\top \psi_k(Y - m - zV^\top - c) / \overline{\psi_k'}` with :math:`\psi_k(t) = \mathrm{clip}(t, -k, k)`, starting from
    `sparse`. No threshold is applied on the way, so pixels of rare materials, which lie beyond the threshold in all bands, are not lost.
    """
    z, k = space.to_latent(white - sparse), config.huber
    for step in range(config.huber_rounds):
        residual = white - space.to_spectra(z)
        if step % 3 == 0:
            offset = rule.lines(residual)
        residual -= offset
        inside = float((np.abs(residual) < k).mean())
        z = z + np.clip(residual, -k, k) @ space.basis / max(inside, 0.1)
    return rule(white - space.to_spectra(z))


@dataclass(frozen=True, eq=False)
class CubeProblem:
    """A cube in units of its standard deviation, its noise and sparse part, and the choices for its fit."""

    values: np.ndarray  # (H, W, B) float32
    noise: np.ndarray  # (B,)
    sparse: np.ndarray  # (H, W, B) in units of the noise
    rank: int
    penalty: Penalty
    options: FitOptions
    config: CubeConfig

    def fit_maps(self, counter: StepCounter) -> np.ndarray:  # -> (H, W, B)
        """The clean cube from latent maps over the plane."""
        white, config = self.values / self.noise - self.sparse, self.config
        shape = self.values.shape[:2]
        space = Subspace.of(white, self.rank)
        fit_config = FitConfig(
            steps=config.map_steps,
            learning_rate=config.map_rate,
            n_regularisation=math.prod(shape),
            refresh_every=config.map_refresh,
        )
        z = self._fit(space.to_latent(white), pixel_spline(shape), config.map_strength, fit_config, counter)
        return self.noise * space.to_spectra(z)

    def fit_cube(self, counter: StepCounter) -> np.ndarray:  # -> (H, W, B)
        """The clean cube as one field of three coordinates."""
        config, unit = self.config, np.float32(np.median(self.noise))
        entries = ((self.values - self.noise * self.sparse) / unit)[..., None]
        fit_config = FitConfig(
            steps=config.cube_steps,
            learning_rate=config.cube_rate,
            n_regularisation=min(self.values.size, config.cube_regularisation),
        )
        network = LowRank(omega=config.cube_omega)
        return unit * self._fit(entries, network, config.cube_strength, fit_config, counter)[..., 0]

    def _fit(
        self, values: np.ndarray, network: Network, strength: float, config: FitConfig, counter: StepCounter
    ) -> np.ndarray:  # (n_1, ..., n_d, C) with noise of standard deviation one -> the same shape
        """The field at the nodes of a lattice. Values are fitted in units of the largest standard deviation, which suits the learning rates.

        The network, the strength and the steps are defaults, for options that say ``"auto"``.
        """
        options, shape = self.options, values.shape[:-1]
        flat = values.reshape(-1, values.shape[-1])
        lattice, middle, scale = Lattice.of_shape(*shape), flat.mean(0), float(flat.std(0).max()) or 1.0
        lam = nats(strength, shape, self.penalty.order) if options.lam == "auto" else options.lam
        config = options.fit_config(config)
        field = fit_field(
            Samples(lattice, torch.from_numpy(np.ascontiguousarray((flat - middle) / scale))),
            network=options.network_or(network),
            likelihood=Gaussian(1 / scale),
            penalty=self.penalty,
            lam=lam * scale,
            config=config,
            on_step=counter.stage("fitting", config.steps),
        )
        head = Affine(torch.from_numpy(middle), torch.tensor(scale, dtype=torch.float32))
        return field.with_head(head).on_lattice(lattice).numpy().reshape(values.shape)


def _as_cube(cube: Any) -> np.ndarray:
    """A checked cube, in float64."""
    dtype = getattr(cube, "dtype", None)
    if getattr(dtype, "kind", None) != "f":
        msg = f"`cube` holds {dtype or type(cube).__name__}: expected an array of floats (H, W, B); pass `cube.astype(np.float32)`"
        raise TypeError(msg)
    values = real_array("cube", cube)
    if values.ndim != 3 or min(values.shape[:2], default=0) < MIN_SIDE or values.shape[2] < 2:
        msg = (
            f"`cube` has shape {values.shape}: expected (H, W, B) with at least {MIN_SIDE} x {MIN_SIDE} pixels and 2 bands; an impulse is told from "
            "the scene by the other bands"
        )
        raise ValueError(msg)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        msg = f"`cube` is not finite at {bad} of {values.size} entries: fill them first, for example with 0; they are then found as sparse errors"
        raise ValueError(msg)
    return values


@checked(
    cube=ANYTHING,
    tau=(NONE | POSITIVE).advised("a threshold in the units of the cube"),
    sigma=(NONE | several(POSITIVE)).advised("in the units of the cube"),
    rank=AUTO | SIZE,
    options=OPTIONS,
    config=instance(CubeConfig, "a `neurst.imaging.CubeConfig`"),
)
def denoise_cube(
    cube: np.ndarray,
    *,
    tau: float | None = None,
    sigma: float | np.ndarray | None = None,
    rank: int | str = "auto",
    options: FitOptions = FitOptions(),
    config: CubeConfig = CubeConfig(),
) -> DenoisedCube:
    r"""A hyperspectral cube cleaned of Gaussian noise, impulses, stripes and dead lines, and the sparse errors.

    Let Y be the cube in units of the noise of each band. A robust subspace (mean spectrum m, basis V) and the sparse part S
    (:class:`neurst.imaging.cubes.SparseRule`) are estimated first. Then latent maps z over the plane minimise

    .. math:: \tfrac12 \|(Y - S - m) V - z\|_F^2 + \lambda\,\mathrm{mean}_x P(z)(x),

    by default with the space-variant NeurTV under which all maps share edges, on a spline with the resolution of the pixels. With the penalty
    ``"mixed"`` the method is NeurSSTV :cite:p:`Luo2025` instead: one field of three coordinates, a low-rank tensor network, is fitted to ``Y - S``.

    Parameters
    ----------
    cube
        (H, W, B) finite floats in any unit and range.
    tau
        Threshold of sparse errors, in units of the cube. Entries that differ from the clean cube, and from the offset of their line, by more than
        this are sparse errors. None means 2.5 `sigma`.
    sigma
        Standard deviation of the noise, in the units of the data; None estimates it. It is that of the Gaussian part, one number or one for
        each band. The estimate of a band is the median absolute residual of the low-rank fit over 0.6745, but at least 0.2 of the typical spread
        of a band, because a few materials do not describe every detail of a scene. Pass `sigma` if the noise is known to be less.
    rank
        Number of latent maps. ``"auto"`` takes the components above the noise and 2 more, whose noise the penalty removes; at most half the bands.
    options
        Choices that every fit offers, such as `lam` and ``progress``. Here ``lam="auto"`` is not a search but a formula: ``c N (2 / (n - 1))^k``
        nats for maps in units of the noise, with N pixels, n the longest side, k the order of the penalty and c = 0.55. For ``"mixed"``, N and n
        are those of the cube and c = 0.5.
    config
        Numbers of the method.

    Returns
    -------
    DenoisedCube
        ``clean`` and ``sparse``, (H, W, B), in the units and the type of the cube:
        ``sparse = c + T_tau(cube - clean - c)``, c the offsets of lines.

    Raises
    ------
    TypeError
        If the cube does not hold floats.
    ValueError
        If the cube is not three-dimensional, has fewer than 2 bands or 4 pixels along a side, or is not finite; or if a number is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, denoise_cube
    >>> cube = np.zeros((12, 10, 8)) + np.linspace(1, 2, 8)
    >>> cube[6:] *= 2
    >>> cube[3, 4, 5] = 50.0  # an impulse
    >>> clean, sparse = denoise_cube(cube, sigma=0.05, options=FitOptions(progress=False))
    >>> bool(abs(clean[3, 4, 5] - cube[3, 5, 5]) < 0.05), np.argwhere(sparse).tolist()
    (True, [[3, 4, 5]])
    """
    if options.search != LineSearch():
        msg = "`options.search`: the strength for a cube follows a formula and is not searched for; pass `lam` to choose it"
        raise ValueError(msg)
    values = _as_cube(cube)
    n_bands = values.shape[2]
    if sigma is not None and len(sigma) not in (1, n_bands):
        msg = f"`sigma` has {len(sigma)} entries: expected one number, or one for each of the {n_bands} bands"
        raise ValueError(msg)
    penalty = pixel_penalty(options.penalty, values.shape[:2], ImageConfig())
    largest = float(np.abs(values).max()) or 1.0  # scaled by this, no square over- or underflows
    middle, scale = float(np.median(values)), float((values / largest).std()) * largest
    if not scale > 1e-12 * largest:  # one value everywhere
        return DenoisedCube(values.astype(cube.dtype), np.zeros_like(values, dtype=cube.dtype))
    y = ((values - middle) / scale).astype(np.float32)
    bands = np.ones(n_bands, np.float32)
    noise, rule, sparse, beyond = _start(
        y,
        None if sigma is None else (np.array(sigma) / scale).astype(np.float32) * bands,
        None if tau is None else np.float32(tau / scale) * bands,
        config,
    )
    white = y / noise
    rank = min(beyond + config.extra_rank, max(1, n_bands // 2)) if rank == "auto" else min(rank, n_bands)
    sparse = _regressed(white, sparse, Subspace.of(white - sparse, rank), rule, config)
    problem = CubeProblem(y, noise, sparse, rank, penalty, options, config)
    with progress_bar(options.progress) as on_progress:
        counter = StepCounter(on_progress)
        clean = problem.fit_cube(counter) if penalty.needs_spectrum else problem.fit_maps(counter)
    sparse = noise * rule((y - clean) / noise)
    out = (clean.astype(np.float64) * scale + middle, sparse.astype(np.float64) * scale)
    return DenoisedCube(*(part.astype(cube.dtype) for part in out))
