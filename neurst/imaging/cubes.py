r"""Hyperspectral cubes with mixed noise: Gaussian noise, impulses, stripes and dead lines at once.

The model is :math:`Y = X + S + \mathrm{noise}`. Bands are far more than materials, so :math:`X = m + z V^\top` has few latent maps z, and
what is wrong with single entries or columns does not fit the spectra of a pixel: S is what a robust regression on V leaves over.
The maps are then a field over the plane, regularised by NeurTV :cite:p:`Luo2025`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from neurst.core.fit import Field, FitConfig, fit_field
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian
from neurst.core.nets import LowRank, Network, as_network
from neurst.core.penalty import MixedTV, Penalty
from neurst.core.samples import Samples
from neurst.imaging.pixels import pixel_penalty, pixel_spline, prior_strength

MAD_OF_NORMAL = 0.6745  # median |t| of a standard normal
TAU_IN_NOISE = 2.5  # of `tau=None`
NOISE_IN_SPREAD = 0.2  # the least of `sigma=None`


class Demixed(NamedTuple):
    """A cube taken apart; what is left, ``cube - clean - sparse``, is at most `tau` everywhere."""

    clean: np.ndarray  # (H, W, B)
    sparse: np.ndarray  # (H, W, B): impulses, stripes, dead lines


@dataclass(frozen=True)
class SparseRule:
    r"""What counts as sparse in residuals R, in units of the noise: :math:`S = c + T_\tau(R - c)`.

    c are offsets of whole columns and rows of a band, their medians where these lie beyond `line` standard errors of a median of n
    normals, :math:`\sqrt{\pi / 2n}`, else 0; :math:`T_\tau(t) = t` if :math:`|t| > \tau`, else 0.

    Parameters
    ----------
    tau
        (B,) thresholds in units of the noise.
    line
        Standard errors.
    """

    tau: np.ndarray
    line: float = 4.0

    def lines(self, residual: np.ndarray) -> np.ndarray:  # (H, W, B) -> (H, W, B)
        """c."""
        out = np.zeros_like(residual)
        for axis in (0, 1):
            middle = np.median(residual - out, axis=axis, keepdims=True)
            error = math.sqrt(math.pi / 2 / residual.shape[axis])
            out += np.where(np.abs(middle) > self.line * error, middle, 0)
        return out

    def __call__(self, residual: np.ndarray) -> np.ndarray:  # (H, W, B) -> (H, W, B)
        """S."""
        offset = self.lines(residual)
        rest = residual - offset
        return offset + np.where(np.abs(rest) > self.tau, rest, 0)


@dataclass(frozen=True, eq=False)
class Subspace:
    """Spectra ``mean + z V'`` of pixels in few latent coordinates, V orthonormal."""

    mean: np.ndarray  # (B,)
    basis: np.ndarray  # (B, r)

    @classmethod
    def of(cls, spectra: np.ndarray, rank: int) -> Subspace:
        """The leading principal directions of spectra (..., B)."""
        return cls(*_principal(spectra)[:2]).leading(rank)

    def leading(self, rank: int) -> Subspace:
        """Its first directions."""
        return Subspace(self.mean, self.basis[:, :rank])

    def inward(self, spectra: np.ndarray) -> np.ndarray:  # (..., B) -> (..., r)
        """Coordinates z of the nearest spectra in the subspace."""
        return (spectra - self.mean) @ self.basis

    def outward(self, z: np.ndarray) -> np.ndarray:  # (..., r) -> (..., B)
        """Spectra."""
        return z @ self.basis.T + self.mean


def _principal(spectra: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, principal directions (columns) and variances along them, largest first."""
    flat = spectra.reshape(-1, spectra.shape[-1])
    mean = flat.mean(0)
    centred = flat - mean
    size, basis = np.linalg.eigh((centred.T @ centred).astype(float) / len(flat))
    # a sign that does not hang on the order of the bands
    basis = basis * np.where((basis**3).sum(0) < 0, -1, 1)
    return mean, basis[:, ::-1].astype(spectra.dtype), size[::-1]


def _rank_beyond_noise(variances: np.ndarray, n: int, margin: float = 1.5) -> int:
    r"""Components whose variance exceeds `margin` times that of pure noise of unit variance at most, :math:`(1 + \sqrt{B / n})^2`."""
    return max(1, int((variances > margin * (1 + math.sqrt(len(variances) / n)) ** 2).sum()))


def _mad(residual: np.ndarray) -> np.ndarray:  # (H, W, B) -> (B,)
    return np.median(np.abs(residual), axis=(0, 1)) / MAD_OF_NORMAL


def _start(
    y: np.ndarray, sigma: np.ndarray | None, tau: np.ndarray | None, multiple: float, rounds: int = 8
) -> tuple[np.ndarray, SparseRule, np.ndarray, int]:
    """Noise of each band (B,), the rule, a first S in units of the noise, and the rank beyond the noise.

    Low rank and sparse part in turn, from 3 x 3 medians; the noise is the median absolute residual, a share ``|V_b|^2`` of which
    the subspace has swallowed.
    """
    from scipy.ndimage import median_filter  # slow to import

    n, n_bands = y.shape[0] * y.shape[1], y.shape[2]
    spread = float(np.median(_mad(y - np.median(y, axis=(0, 1)))))
    residual = y - median_filter(y, (3, 3, 1))
    noise = _floored(_mad(residual), spread) if sigma is None else sigma
    rule = SparseRule(multiple * np.ones_like(noise) if tau is None else tau / noise)
    sparse = noise * rule(residual / noise)
    for _ in range(rounds):
        white = (y - sparse) / noise
        mean, basis, variances = _principal(white)
        rank = min(_rank_beyond_noise(variances, n), max(1, n_bands // 2))
        space = Subspace(mean, basis[:, :rank])
        residual = y - noise * space.outward(space.inward(white))
        if sigma is None:
            kept = 1 - np.minimum((space.basis**2).sum(1), 0.8)
            noise = _floored(_mad(residual - noise * rule.lines(residual / noise)) / np.sqrt(kept), spread)
        rule = SparseRule(rule.tau if tau is None else tau / noise)
        sparse = noise * rule(residual / noise)
    return noise, rule, sparse / noise, rank


def _floored(noise: np.ndarray, spread: float, of_median: float = 0.3) -> np.ndarray:
    """No band is free of noise, its weight would be infinite; and what few materials miss of a real scene counts as noise."""
    return np.maximum(noise, max(of_median * float(np.median(noise)), NOISE_IN_SPREAD * spread, 1e-6))


def _regressed(
    white: np.ndarray, sparse: np.ndarray, space: Subspace, rule: SparseRule, k: float = 1.0, rounds: int = 10
) -> np.ndarray:
    r"""S left over by the robust regression of each pixel on the subspace (Huber's).

    Newton steps :math:`z \leftarrow z + V^\top \psi_k(Y - m - zV^\top - c) / \overline{\psi_k'}` with :math:`\psi_k(t) = \mathrm{clip}(t, -k, k)` from the start that `sparse`
    gives. No threshold is on the way: pixels of rare materials, all of whose bands lie beyond one, are not lost.
    """
    z = space.inward(white - sparse)
    for step in range(rounds):
        residual = white - space.outward(z)
        if step % 3 == 0:
            offset = rule.lines(residual)
        residual -= offset
        inside = float((np.abs(residual) < k).mean())
        z = z + np.clip(residual, -k, k) @ space.basis / max(inside, 0.1)
    return rule(white - space.outward(z))


def demix(
    cube: np.ndarray,
    *,
    tau: float | None = None,
    sigma: float | np.ndarray | None = None,
    penalty: str | Penalty = "space_variant",
    network: str | Network = "auto",
    lam: float | str = "auto",
    rank: int | str = "auto",
    steps: int | str = "auto",
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Demixed:
    r"""A hyperspectral cube without Gaussian noise, impulses, stripes and dead lines, and these sparse errors.

    With ``Y / sigma`` for the cube in units of the noise of each band, the robust subspace V and the sparse part S of :class:`SparseRule` come
    first; then latent maps z over the plane minimise

    .. math:: \tfrac12 \|(Y - S - m) V - z\|_F^2 + \lambda\,\mathrm{mean}_x P(z)(x),

    by default with the space-variant NeurTV whose edges all maps share, on a spline of the resolution of the pixels. With
    ``penalty="mixed"`` it is NeurSSTV :cite:p:`Luo2025`: one field of three coordinates fitted to ``Y - S``, on a low-rank tensor network.
    Both squares are those of the truncated residual at the S found.

    Parameters
    ----------
    cube
        (H, W, B) finite floats in any unit and range.
    tau
        Entries further than this from the clean cube, beyond offsets of their line, are sparse errors; in units of the cube. None: 2.5 `sigma`.
    sigma
        Standard deviation of the Gaussian noise in units of the cube, a number or (B,). None: estimated for each band, as the
        median absolute residual of the low-rank fit over 0.6745, and at least 0.2 of the spread of a band: what few materials miss of a scene
        is no impulse. Give it where the noise is known to be less.
    penalty
        Regulariser of the latent maps: a name of :data:`neurst.core.penalty.PENALTIES` or a penalty; :class:`MixedTV` (``"mixed"``) acts on the cube.
    network
        Of the maps or of the cube. ``"auto"``: splines with a knot at each 1, 4, 16, .. pixels; for ``"mixed"`` a low-rank tensor.
    lam
        Prior strength in nats, >= 0, of maps in units of the noise. ``"auto"``: ``c N (2 / (n - 1))^k``, N pixels, n the longest side, 2 / (n - 1)
        a pixel in box units, k the order of the penalty and c = 0.55; for ``"mixed"`` N and n are those of the cube and c = 0.5.
    rank
        Latent maps. ``"auto"``: components beyond the noise and 2 more, whose noise the penalty takes; at most half the bands.
    steps
        Of the fit; ``"auto"``: 200, or 800 for ``"mixed"``.
    random_state, device
        Of the fit.
    progress
        Show a bar.

    Returns
    -------
    Demixed
        ``clean`` and ``sparse``, (H, W, B), in the units and the type of the cube:
        ``sparse = c + T_tau(cube - clean - c)``, c the offsets of lines.

    Raises
    ------
    TypeError
        If the cube is not floating.
    ValueError
        If the cube is not three-dimensional, has fewer than 2 bands or 4 pixels along a side, or holds NaN; or a number is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> cube = np.zeros((12, 10, 8)) + np.linspace(1, 2, 8)
    >>> cube[6:] *= 2
    >>> cube[3, 4, 5] = 50.0  # an impulse
    >>> clean, sparse = demix(cube, sigma=0.05, progress=False)
    >>> bool(abs(clean[3, 4, 5] - cube[3, 5, 5]) < 0.05), np.argwhere(sparse).tolist()
    (True, [[3, 4, 5]])
    """
    _check(cube, tau, sigma, lam, rank, steps)
    penalty = pixel_penalty(penalty, cube.shape[:2])
    middle, scale = float(np.median(cube)), float(cube.std())
    if scale == 0:
        return Demixed(cube.copy(), np.zeros_like(cube))
    y = ((cube - middle) / scale).astype(np.float32)
    bands = np.ones(cube.shape[2], np.float32)
    noise, rule, sparse, beyond = _start(
        y,
        None if sigma is None else np.float32(sigma) / np.float32(scale) * bands,
        None if tau is None else np.float32(tau) / np.float32(scale) * bands,
        TAU_IN_NOISE,
    )
    white = y / noise
    most = max(1, cube.shape[2] // 2)
    rank = min(beyond + 2, most) if rank == "auto" else min(rank, cube.shape[2])
    sparse = _regressed(white, sparse, Subspace.of(white - sparse, rank), rule)
    config = FitConfig(random_state=random_state, device=device)
    fit = _fit_cube if isinstance(penalty, MixedTV) else _fit_maps
    with tqdm(desc="demix", disable=not progress) as bar:
        clean = fit(y, noise, sparse, rank, penalty, network, lam, steps, config, bar)
    sparse = noise * rule((y - clean) / noise)
    return Demixed((clean * scale + middle).astype(cube.dtype), (sparse * scale).astype(cube.dtype))


def _fit_maps(y, noise, sparse, rank, penalty, network, lam, steps, config, bar) -> np.ndarray:
    white = y / noise - sparse
    space = Subspace.of(white, rank)
    z = space.inward(white).reshape(-1, rank)  # (N, r)
    height, width = y.shape[:2]
    config = dataclasses.replace(
        config,
        steps=200 if steps == "auto" else steps,
        learning_rate=0.3,
        n_regularisation=len(z),
        refresh_every=25,
    )
    field = _fit(
        z,
        Lattice.of_shape(height, width),
        pixel_spline((height, width)) if network == "auto" else as_network(network),
        penalty,
        prior_strength(0.55, (height, width), penalty.order) if lam == "auto" else lam,
        config,
        bar,
    )
    return noise * space.outward(field.reshape(height, width, rank))


def _fit_cube(y, noise, sparse, rank, penalty, network, lam, steps, config, bar) -> np.ndarray:
    unit = np.float32(np.median(noise))
    values = (y - noise * sparse) / unit
    config = dataclasses.replace(
        config,
        steps=800 if steps == "auto" else steps,
        learning_rate=3e-3,
        n_regularisation=min(values.size, 60_000),
    )
    field = _fit(
        values.reshape(-1, 1),
        Lattice.of_shape(*y.shape),
        LowRank(omega=20.0) if network == "auto" else as_network(network),
        penalty,
        prior_strength(0.5, y.shape, penalty.order) if lam == "auto" else lam,
        config,
        bar,
    )
    return unit * field.reshape(y.shape)


def _fit(
    values: np.ndarray, lattice: Lattice, network: Network, penalty: Penalty, lam: float, config: FitConfig, bar: tqdm
) -> np.ndarray:  # (N, C) -> (N, C)
    """The field at the nodes; fitted in units of the largest standard deviation, which rates of learning know."""
    middle, gain = values.mean(0), float(values.std(0).max()) or 1.0
    bar.reset(total=config.steps)
    field: Field = fit_field(
        Samples(lattice, torch.from_numpy((values - middle) / gain)),
        network=network,
        likelihood=Gaussian(1 / gain),
        penalty=penalty,
        lam=lam * gain,
        config=config,
        on_step=lambda step, objective: bar.update(),
    )
    return field(lattice).numpy() * gain + middle


def _check(cube, tau, sigma, lam, rank, steps) -> None:
    if not isinstance(cube, np.ndarray) or cube.ndim != 3:
        msg = f"`cube` has shape {np.shape(cube)}: expected an array (height, width, bands)"
        raise ValueError(msg)
    if not np.issubdtype(cube.dtype, np.floating):
        msg = f"`cube` is {cube.dtype}: expected floats; pass `cube.astype(np.float32)`, the results come in the same unit"
        raise TypeError(msg)
    height, width, n_bands = cube.shape
    if min(height, width) < 4 or n_bands < 2:
        msg = f"`cube` has shape {cube.shape}: expected at least 4 x 4 pixels and 2 bands; impulses show against the other bands"
        raise ValueError(msg)
    bad = int((~np.isfinite(cube)).sum())
    if bad:
        msg = f"`cube` is not finite at {bad} of {cube.size} entries: fill them first, with 0 say, and they are found as sparse errors"
        raise ValueError(msg)
    if tau is not None and not (tau > 0 and math.isfinite(tau)):
        msg = f"`tau={tau!r}`: expected a positive threshold in the units of the cube, or None"
        raise ValueError(msg)
    if sigma is not None and not (
        np.shape(sigma) in ((), (n_bands,)) and np.all(np.isfinite(sigma) & (np.asarray(sigma) > 0))
    ):
        msg = f"`sigma={sigma!r}`: expected a positive number, or one for each of the {n_bands} bands, in the units of the cube, or None"
        raise ValueError(msg)
    if lam != "auto" and not (isinstance(lam, int | float) and lam >= 0 and math.isfinite(lam)):
        msg = f'`lam={lam!r}`: expected a finite number >= 0, or "auto"'
        raise ValueError(msg)
    for name, value in (("rank", rank), ("steps", steps)):
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            msg = f'`{name}={value!r}`: expected a whole number >= 1, or "auto"'
            raise ValueError(msg)
