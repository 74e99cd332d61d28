"""Values and derivatives of a fitted field, at a dense lattice, at any coordinates, or at the spots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from neurst.core.arguments import (
    ANYTHING,
    FLAG,
    NONE,
    POSITIVE,
    checked,
    coordinates,
    one_of,
    warn,
)
from neurst.spatial.adata import keys, read, results, write
from neurst.spatial.adata.serialise import StoredFit, stored_fit
from neurst.spatial.matrix import spot_chunks
from neurst.spatial.support import LATTICES, Support, TooManyPoints, support_of
from neurst.tl._fit import FIT_RULES, evaluate, has_std, neurtv_fit

BYTES_OF_OBS = 90  # of a point: its name in `obs_names`, and the columns of `obs`
LENGTH = (NONE | POSITIVE).advised("a distance in the units of the coordinates")


@checked(
    adata=read.ADATA,
    factor=POSITIVE,
    spacing=LENGTH,
    lattice=one_of(*dict.fromkeys(LATTICES[2] + LATTICES[3])),
    support_radius=LENGTH,
    genes=FIT_RULES["genes"],
    key=read.KEY,
    max_gb=POSITIVE,
    progress=FLAG,
)
def neurtv_superres(
    adata: AnnData,
    *,
    factor: float = 2,
    spacing: float | None = None,
    lattice: Literal["auto", "hexagonal", "square", "cubic"] = "auto",
    support_radius: float | None = None,
    genes: Sequence[str] | str | None = None,
    key: str = "neurtv",
    max_gb: float = 8.0,
    progress: bool = True,
) -> AnnData:
    """Expression on a dense lattice inside the tissue, as a new AnnData.

    Evaluates the field stored under ``uns[key]``. If there is none, :func:`neurtv_fit` is called with its defaults first, so `adata`
    then also holds the fit. But if there are fits under other names only, a `key` other than the default is an error.

    Parameters
    ----------
    adata
        One section, or some of its spots: the lattice fills the tissue around these spots.
    factor
        The spacing of the lattice is the spot pitch divided by this: 2 gives about four times the spots in 2-d. In a stack of sections (3-d
        positions with few distinct heights) the distances between sections are divided by it as well.
    spacing
        Spacing in the units of the coordinates, instead of `factor`.
    lattice
        ``"auto"`` is hexagonal if the spots are, else square; cubic in 3-d. If the spots form such a lattice, the new one is aligned with it.
    support_radius
        Points within this distance of a measured spot are tissue. If None, 1.05 pitch on lattices (one missing spot is filled, a
        larger hole is not), else the 99th percentile of the distance to the third neighbour. In a stack this applies within a section. Between two
        sections the shape of the tissue is interpolated; there is no tissue above the top or below the bottom section.
    genes
        Names of genes; None takes all. Only fitted genes have a field.
    key
        Name of the fit.
    max_gb
        Largest size of the result in GB; an error is raised before a larger one is built.
    progress
        Show a progress bar. It is shown only if a fit is needed.

    Returns
    -------
    AnnData
        ``X`` (float32): expected expression, for counts at library size ``uns[key]["field"]["target_sum"]``. ``var`` with its columns,
        ``layers["<key>_std"]`` (float32), its posterior standard deviation, if the fit has one; ``obsm["spatial"]``, ``obs["distance_to_spot"]``,
        ``obs["in_support"]``, ``uns["spatial"]`` copied with the spot diameter adjusted, and ``uns[key]`` with the field, so that the result
        can be queried and differentiated.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, there is no fit under a `key` other than the default, `factor` and `spacing` are both given, the result would
        be larger than `max_gb`, or spots were moved since the fit.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> dense = neurst.tl.neurtv_superres(adata, factor=2)
    >>> 3.5 < dense.n_obs / adata.n_obs < 4.5
    True
    """
    if spacing is not None and factor != 2:
        msg = f"`factor={factor:g}` and `spacing={spacing:g}` were both given: pass one of them"
        raise ValueError(msg)
    if not keys.fit_slot(key).present(adata) and (key == keys.DEFAULT_KEY or not keys.holds_fit(adata)):
        read.gene_index(adata, genes)  # before a fit that takes its time
        neurtv_fit(adata, key_added=key, progress=progress)
    stored = stored_fit(adata, key)
    write.check_images(adata)
    coords, supports = results.check_places(adata, stored)
    names = results.field_genes(stored, genes)
    support = support_of(stored.spots, support_radius)
    # measured spots may be a subset, whose tissue is filled; points of a query fill the tissue of all fitted spots
    filled = support if stored.query is not None else support.restricted_to(coords[supports])
    points = _dense_points(filled, stored, names, max_gb, factor=factor, spacing=spacing, kind=lattice)
    spacing = support.pitch / factor if spacing is None else spacing
    out = _read_at(adata, stored, points, names, support, support.contains(points), {"spacing": float(spacing)})
    between = support.pitch if stored.query is None else stored.query.get("spacing", support.pitch)
    write.copy_images(adata, out, spacing / between)
    return out


def _dense_points(support: Support, stored: StoredFit, genes: Sequence[str], max_gb: float, **options) -> NDArray:
    """Points of a lattice, at which values of `genes` take at most `max_gb`."""
    tables = 1 if not has_std(stored.field) else 2
    bytes_each = 4 * len(genes) * tables + 16 * stored.field.n_dims + BYTES_OF_OBS
    try:
        return support.lattice(**options, max_points=max(1, int(max_gb * 1e9 / bytes_each)))
    except TooManyPoints as error:
        msg = (
            f"the result with {len(genes)} genes would take about {error.count * bytes_each / 1e9:,.1f} GB, above `max_gb={max_gb:g}`: {error}. "
            "Pass a larger `spacing`, a smaller `factor`, fewer `genes`, or a larger `max_gb`"
        )
        raise ValueError(msg) from None


def _read_at(
    adata: AnnData,
    stored: StoredFit,
    points: NDArray,
    genes: Sequence[str],
    support: Support,
    inside: NDArray,
    about: dict[str, Any],
) -> AnnData:
    """A new AnnData of a field at points. `about` says how: values outside the tissue are NaN if ``about["outside"]`` is "nan"."""
    field = stored.field.select(genes)
    values, std = evaluate(field, points)
    if about.get("outside") == "nan":
        for table in (values,) if std is None else (values, std):
            table[~inside] = np.nan
    return write.new_adata(
        adata,
        stored,
        points,
        values,
        std,
        genes,
        distance=support.distance(points),
        in_support=inside,
        radius=support.radius,
        about=about,
    )


@checked(
    adata=read.ADATA,
    coords=ANYTHING,
    genes=FIT_RULES["genes"],
    key=read.KEY,
    outside=one_of("nan", "extrapolate", "raise"),
    support_radius=LENGTH,
)
def neurtv_query(
    adata: AnnData,
    coords: ArrayLike,
    *,
    genes: Sequence[str] | str | None = None,
    key: str = "neurtv",
    outside: Literal["nan", "extrapolate", "raise"] = "nan",
    support_radius: float | None = None,
) -> AnnData:
    """Values of the stored field at any coordinates, as a new AnnData.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``; its own spots are not used.
    coords
        (N, d) points, in the units of the positions that the field was fitted to.
    genes
        Names of genes; None takes all. Only fitted genes have a field.
    key
        Name of the fit.
    outside
        What to do outside the tissue: ``"nan"`` sets values to NaN, ``"extrapolate"`` evaluates the field there as well, ``"raise"`` is an error.
    support_radius
        As in :func:`neurtv_superres`.

    Returns
    -------
    AnnData
        As from :func:`neurtv_superres`, but without ``uns["spatial"]``; one row for each point, in the order given.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, `coords` has another shape or is not finite, or a point is outside and ``outside="raise"``.

    Warns
    -----
    UserWarning
        If most points are far outside the range of the fitted spots, or all values are NaN: the units may differ.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_query(adata, adata.obsm["spatial"][:5] + 30.0).shape
    (5, 20)
    """
    stored = stored_fit(adata, key)
    names = results.field_genes(stored, genes)
    coords = coordinates("coords", coords, (stored.field.n_dims,), least=1)
    support = support_of(stored.spots, support_radius)
    inside = support.contains(coords)
    beyond = ~inside
    if outside == "raise" and beyond.any():
        first = int(np.argmax(beyond))
        msg = (
            f"`coords`: {int(beyond.sum())} of {len(coords)} points are outside the tissue, more than {support.radius:.4g} from a spot (first: row {first}, "
            f"{coords[first].tolist()}): drop them, or pass outside='nan' or 'extrapolate'"
        )
        raise ValueError(msg)
    if _is_elsewhere(coords, stored.spots) or (outside == "nan" and beyond.all()):
        warn(
            f"{int(beyond.sum())} of {len(coords)} points are outside the tissue: `coords` range from {_range(coords)}, but the field was "
            f"fitted from {_range(stored.spots)}; are the units the same?"
        )
    return _read_at(adata, stored, coords, names, support, inside, {"outside": outside})


def _is_elsewhere(coords: NDArray, spots: NDArray) -> bool:
    """Whether most points are farther from the bounding box of the spots than half its longest side."""
    low, high = spots.min(0), spots.max(0)
    margin = (high - low).max() / 2
    return ((coords < low - margin) | (coords > high + margin)).any(axis=1).mean() > 0.5


def _range(x: NDArray) -> str:
    def show(corner: NDArray) -> str:
        return "(" + ", ".join(f"{v:.6g}" for v in corner) + ")"

    return f"{show(x.min(0))} to {show(x.max(0))}"


@checked(adata=read.ADATA, genes=FIT_RULES["genes"], key=read.KEY)
def neurtv_gradient(adata: AnnData, *, genes: Sequence[str] | str | None = None, key: str = "neurtv") -> None:
    r"""Exact spatial derivatives of the stored field at the spots.

    For counts, :math:`\partial_x \mu_g = \mu_g\, V_g \cdot \partial_x z`, with derivatives of the latent field z by Taylor arithmetic, not finite
    differences.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``: the fitted section, some of its spots, or what :func:`neurtv_superres` or :func:`neurtv_query` returned.
    genes
        Names of genes; None takes all. Only fitted genes have a field.
    key
        Name of the fit.

    Returns
    -------
    None, and writes

    ``layers["<key>_dx"]``, ``layers["<key>_dy"]`` (and ``["<key>_dz"]`` in 3-d) : (n_obs, n_vars) float32
        Derivatives of the expected expression per unit of the coordinates; in `obsm` for fewer than half of the genes.
    ``var["<key>_gradient"]`` : float
        Mean norm of a gene's gradient over the spots in the tissue.
    ``obs["<key>_boundary"]`` : float
        Strength of tissue boundaries, in standard deviations per unit of the coordinates: the root mean square over all fitted genes of the size of
        the gradient of the log-rate (or of the normalised value). The gradient of each gene is in units of the gene's own standard deviation over
        the spots, and the mean is weighted by the geometric mean of the gene's expected counts (all weights are 1 for normalised values). It finds
        strong anatomical borders, such as the edge of a tumour; borders between similar neighbouring regions are weak and gradual in it.

    Raises
    ------
    KeyError, TypeError, ValueError
        If there is no such fit or gene, spots were moved or rescaled since the fit, results would overwrite something that is not from
        this fit, or a table would be above 2 GB.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_gradient(adata)
    >>> sorted(adata.layers)
    ['neurtv', 'neurtv_dx', 'neurtv_dy', 'neurtv_std']
    """
    stored = stored_fit(adata, key)
    names = results.genes_at_hand(adata, stored, genes)
    coords, _ = results.check_places(adata, stored)
    write.check_gradient_slots(adata, stored, len(names))
    field, masked = stored.field.select(names), results.masked_points(adata, stored)
    tissue = read.in_tissue(adata) & ~masked
    derivatives = [np.empty((len(coords), len(names)), dtype=np.float32) for _ in range(field.n_dims)]
    total, boundary = np.zeros(len(names)), np.empty(len(coords))
    for rows in spot_chunks(len(coords), len(names) * field.n_dims):
        latent, jacobian = stored.field.latent_jacobian(coords[rows])
        gradient, boundary[rows] = field.gradient_of(latent, jacobian), stored.field.boundary_of(jacobian)
        total += np.linalg.norm(gradient[tissue[rows]], axis=-1).sum(0)
        gradient[masked[rows]] = np.nan
        for axis, table in enumerate(derivatives):
            table[rows] = gradient[:, :, axis]
    boundary[masked] = np.nan
    columns = adata.var_names.get_indexer(names)
    write.write_gradient(adata, stored, columns, derivatives, total / max(tissue.sum(), 1), boundary)
