"""Figures of an expression field: values, derivatives, and the history of its fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from neurst.core.arguments import ANYTHING, NAMES, NONE, POSITIVE, SIZE, TEXT, checked, number
from neurst.pl import _draw
from neurst.spatial.adata import read, results
from neurst.spatial.adata.serialise import StoredFit, stored_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap


LIMIT = (number() | TEXT).advised("a percentile is given as 'p99.5'")
SHARED = {
    "adata": read.ADATA,
    "key": read.KEY,
    "gene_symbols": (NONE | TEXT).advised("a column of `var`"),
    "cmap": NONE | _draw.CMAP,
    "vmin": NONE | LIMIT,
    "vmax": LIMIT,
    "size": POSITIVE,
    "ax": ANYTHING,
}


@checked(genes=NAMES, spots=NONE | read.ADATA, layer=NONE | TEXT, size_factors=ANYTHING, **SHARED)
def superres(
    adata: AnnData,
    genes: Sequence[str] | str,
    *,
    spots: AnnData | None = None,
    key: str = "neurtv",
    layer: str | None = None,
    gene_symbols: str | None = None,
    size_factors: str | Sequence[float] | None = None,
    cmap: str | Colormap | None = None,
    vmin: float | str | None = None,
    vmax: float | str = "p99.5",
    size: float = 1.0,
    ax: Axes | ArrayLike | None = None,
) -> Axes | NDArray:
    """Expression of genes in space, alone or next to the measured expression, on one colour scale.

    Points of a lattice are drawn as tiles (hexagons, squares), other points as discs as wide as the median distance to the nearest
    point. Their size is in the units of the coordinates, so they scale with the figure. y points down. NaN is not drawn, nor are
    spots marked ``in_tissue == 0``.

    Parameters
    ----------
    adata
        What :func:`neurst.tl.neurtv_superres` or :func:`neurst.tl.neurtv_query` returned, drawn from `X`; or the fitted spots, drawn from
        ``layers[key]`` (or ``obsm[key]``).
    genes
        One name, or several.
    spots
        Measured spots, drawn to the left of each field in the unit of the field: for counts, counts / library size * `target_sum`.
    key
        Name of the fit.
    layer
        Layer to draw, unchanged, instead of the field.
    gene_symbols
        Column of `var` with the names that `genes` and the figure use; ``var_names`` if None.
    size_factors
        Library sizes, an array (n_obs,) or a column of `obs`; they belong to `spots`. None takes the column that :func:`neurst.tl.neurtv_fit`
        was given, else totals over all genes.
    cmap
        Colour map of matplotlib, or its name. None takes ``"viridis"``.
    vmin, vmax
        Ends of the colour scale: numbers, or percentiles of the field such as ``"p99.5"``. If None, `vmin` is 0 for counts, else
        ``"p0.5"``. An end of the colour bar is pointed if values go beyond it.
    size
        Width of a point, as a multiple of its default width. In 3-d it is approximate.
    ax
        Axes to draw on, in the shape that is returned; a new figure if None. Colour bars are placed to the right of the Axes: make the
        figure with ``layout="constrained"``. For 3-d positions, Axes need ``projection="3d"``.

    Returns
    -------
    One Axes for one name, an array (G,) for several. With `spots`, an array (2,) of measured and field, or (G, 2).

    Raises
    ------
    KeyError, ValueError
        If there is no such fit, gene or layer, or `ax` has another shape.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20, random_state=1)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> dense = neurst.tl.neurtv_superres(adata, factor=2)
    >>> neurst.pl.superres(dense, "Layer2_01").get_title()
    'Layer2_01'
    >>> neurst.pl.superres(dense, ["Layer2_01", "Nucleus_01"], spots=adata).shape
    (2, 2)
    """
    if spots is not None and layer is not None:
        msg = f"`layer={layer!r}` and `spots` were both given, but a layer as it is has no common unit with the spots: pass one of them"
        raise ValueError(msg)
    stored = stored_fit(adata, key)
    names = _drawable(adata, stored, genes, layer, gene_symbols)
    labels = results.gene_labels(adata, names, gene_symbols)
    clouds = [_field(adata, stored, names, layer)]
    if spots is not None:
        clouds.insert(0, _measured(spots, stored, names, size_factors))
    if vmin is None:
        vmin = 0.0 if stored.field.link.name == "log" and layer is None else "p0.5"
    norms = [_draw.scale(values, vmin, vmax) for values in clouds[-1].values.T]
    shape = (() if isinstance(genes, str) else (len(names),)) + (() if spots is None else (2,))
    axes = _draw.panels(shape, ax, _draw.bounds(clouds))
    for g, (row, name) in enumerate(zip(axes.reshape(len(names), -1), labels, strict=True)):
        _draw.picture(
            row,
            clouds,
            g,
            titles=[name] if spots is None else [f"{name}, measured", f"{name}, field"],
            label=_unit(stored, layer),
            cmap="viridis" if cmap is None else cmap,
            norm=norms[g],
            size=size,
        )
    return axes[()]


def _drawable(
    adata: AnnData, stored: StoredFit, genes: Sequence[str] | str, layer: str | None, gene_symbols: str | None
) -> list[str]:
    """The names of genes, which `adata` must hold, and also the fit unless a layer is drawn."""
    genes = results.genes_of_symbols(adata, genes, gene_symbols)
    fitted = set(stored.field.genes)
    return read.known_genes(genes, [g for g in adata.var_names if layer is not None or g in fitted])


def _field(adata: AnnData, stored: StoredFit, names: list[str], layer: str | None) -> _draw.Cloud:
    """The field, or a layer, at the points of `adata` in the tissue."""
    values = results.read_values(adata, stored, names) if layer is None else read.read_genes(adata, names, layer)
    coords, tissue = results.read_tissue(adata, stored)
    return _draw.Cloud(coords[tissue], values[tissue])


def _measured(
    spots: AnnData, stored: StoredFit, names: list[str], size_factors: str | Sequence[float] | None
) -> _draw.Cloud:
    """Measured expression in the unit of the field, at the spots in the tissue."""
    names = read.known_genes(names, list(spots.var_names))
    layer, spatial_key, column = results.fitted_from(stored)
    size_factors = column if size_factors is None else size_factors
    tissue, coords = read.in_tissue(spots), read.read_coords(spots, spatial_key)
    values = results.read_measured(spots, stored, names, layer, size_factors)
    if coords.shape[1] != stored.field.n_dims:
        msg = f"`spots` have {coords.shape[1]} coordinates, the field has {stored.field.n_dims}: pass the spots it was fitted to"
        raise ValueError(msg)
    return _draw.Cloud(coords[tissue], values[tissue])


def _unit(stored: StoredFit, layer: str | None) -> str:
    if layer is not None:
        return layer
    if stored.field.link.name != "log":
        return "expression"
    total = stored.field.target_sum
    return f"counts (library size {total:,.0f})" if total >= 10 else f"counts (library size {total:.2g})"


@checked(genes=NONE | NAMES, arrows=SIZE, **SHARED)
def gradient(
    adata: AnnData,
    genes: Sequence[str] | str | None = None,
    *,
    key: str = "neurtv",
    gene_symbols: str | None = None,
    arrows: int = 20,
    cmap: str | Colormap | None = None,
    vmin: float | str | None = None,
    vmax: float | str = "p99.5",
    size: float = 1.0,
    ax: Axes | ArrayLike | None = None,
) -> Axes | NDArray:
    """Where expression changes: a map of tissue boundaries, or genes with arrows that point to higher expression.

    Parameters
    ----------
    adata
        The fitted spots, or what :func:`neurst.tl.neurtv_superres` returned, after :func:`neurst.tl.neurtv_gradient`.
    genes
        One name, or several. Each is drawn as expression with arrows for ``layers["<key>_dx"]`` and ``["<key>_dy"]`` at some of the
        points, of length proportional to the gradient. If None, the map of ``obs["<key>_boundary"]``, over all genes together, in standard deviations
        per unit length. Compare it with an annotation: small local maxima need not be anatomy.
    key
        Name of the fit.
    gene_symbols
        As in :func:`superres`.
    arrows
        Number of arrows along the longer side of the tissue.
    cmap
        Colour map of matplotlib, or its name. None takes ``"viridis"`` for genes and ``"magma"`` for boundaries.
    vmin, vmax, size, ax
        As in :func:`superres`.

    Returns
    -------
    One Axes for one name or None, an array (G,) for several.

    Raises
    ------
    KeyError, ValueError
        If there is no such fit or gene, no gradient was stored, or genes are given for 3-d positions.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20, random_state=1)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_gradient(adata)
    >>> neurst.pl.gradient(adata).get_title()
    'Boundaries'
    >>> neurst.pl.gradient(adata, "Layer2_01").get_title()
    'Layer2_01'
    """
    stored = stored_fit(adata, key)
    if genes is None:
        cloud = _boundary(adata, stored)
        norm = _draw.scale(cloud.values, 0.0 if vmin is None else vmin, vmax)
        axes = _draw.panels((), ax, _draw.bounds([cloud]))
        style = {"cmap": "magma" if cmap is None else cmap, "norm": norm, "size": size}
        label = "boundary strength per unit length"
        _draw.picture(axes.reshape(1), [cloud], 0, titles=["Boundaries"], label=label, **style)
        return axes.item()
    names = _drawable(adata, stored, genes, None, gene_symbols)
    if stored.field.n_dims == 3:
        msg = "`genes`: arrows of 3-d positions cannot be read in a picture; call `neurst.pl.gradient(adata)` for the boundary map"
        raise ValueError(msg)
    slopes = results.read_gradient(adata, stored, names, 2)[read.in_tissue(adata)]
    axes = superres(adata, genes, key=key, gene_symbols=gene_symbols, cmap=cmap, vmin=vmin, vmax=vmax, size=size, ax=ax)
    cloud = _field(adata, stored, names, None)
    for g, a in enumerate(np.ravel(np.asarray(axes, dtype=object))):
        drawn = np.isfinite(cloud.values[:, g])
        if drawn.any():
            _draw.draw_arrows(a, cloud.coords[drawn], slopes[drawn, g], across=arrows)
    return axes


def _boundary(adata: AnnData, stored: StoredFit) -> _draw.Cloud:
    """The boundary map at the points of `adata` in the tissue."""
    strength = results.read_boundary(adata, stored)
    coords, tissue = results.read_tissue(adata, stored)
    return _draw.Cloud(coords[tissue], strength[tissue, None])


@checked(adata=read.ADATA, key=SHARED["key"], ax=ANYTHING)
def history(adata: AnnData, *, key: str = "neurtv", ax: ArrayLike | None = None) -> NDArray:
    """How a field was fitted: the loss during the final fits, and the choice of `lam`.

    Parameters
    ----------
    adata
        The AnnData of :func:`neurst.tl.neurtv_fit`.
    key
        Name of the fit.
    ax
        Array of two Axes to draw on; a new figure if None.

    Returns
    -------
    Array of two Axes. The first one shows, for each fit of a network against the step, means over ten steps: objective and negative log-likelihood
    in nats and, on an axis of its own to the right, the penalty in box units, not multiplied by `lam`. The second one shows, for each penalty, the
    held-out score of every strength that was tried, and a line at the strength of the final fits: the one that was given, or
    the one that was chosen (for counts 1.5 times the peak of the scores). The strength of a Gaussian process is not in nats: it is a multiple of
    the strength with the largest marginal likelihood.

    Raises
    ------
    KeyError, ValueError
        If there is no fit under `key`, or `ax` has another shape.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20, random_state=1)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.pl.history(adata).shape
    (2,)
    """
    stored = stored_fit(adata, key)
    trace, search, lam = results.read_history(stored)
    axes = _draw.panels((2,), ax, np.array([[0.0, 0.0], [1.0, 0.8]]))
    _draw_course(axes[0], trace)
    _draw_choice(axes[1], search, lam, "deviance" if stored.field.link.name == "log" else "variance")
    return axes


def _draw_course(ax: Axes, trace: Mapping[str, NDArray]) -> None:
    right, member = ax.twinx(), np.asarray(trace["member"])
    for m in np.unique(member):
        step, objective, likelihood, penalty = (
            np.asarray(trace[name])[member == m] for name in ("step", "objective", "likelihood", "penalty")
        )
        ax.plot(step, objective, color="black", label=None if m else "objective")
        ax.plot(step, likelihood, color="C0", label=None if m else "negative log-likelihood")
        right.plot(step, penalty, color="C1")
    ax.set(xlabel="step", ylabel="nats", title="Final fits" if member.any() else "Final fit")
    right.set_ylim(0, 1.35 * max(trace["penalty"], default=0.0) or 1.0)  # below the legend
    right.set_ylabel("penalty", color="C1")
    right.tick_params(axis="y", colors="C1")
    for a in (ax, right):
        a.spines["top"].set_visible(False)
    if member.size:  # a Gaussian process has no steps
        ax.legend(frameon=False, loc="upper right")


def _draw_choice(ax: Axes, search: Mapping[str, NDArray], lam: Mapping[str, float], what: str) -> None:
    names, tried, scores = (np.asarray(search[name]) for name in ("penalty", "lam", "score"))
    for k, (name, chosen) in enumerate(lam.items()):
        ax.plot(tried[names == name], scores[names == name], "o-", color=f"C{k}", markersize=4)
        ax.axvline(
            chosen,
            color=f"C{k}",
            linestyle="--",
            linewidth=1,
            label=f"{name.replace('_', '-')}, {chosen:,.{0 if chosen >= 10 else 2}f}",
        )
    ax.set(
        xscale="log",
        xlabel="lam (nats; without unit for a Gaussian process)",
        ylabel=f"held-out {what} explained",
        title="Prior strength",
    )
    ticks = np.unique(tried)
    ticks = ticks[:: 1 + len(ticks) // 6]
    ax.set_xticks(ticks, [f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in ticks])
    ax.set_xticks([], minor=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
