"""Figures of an expression field: values, derivatives, and how it was fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from neurst.pl import _draw
from neurst.spatial import door, slots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap


def superres(
    adata: AnnData,
    genes: Sequence[str] | str,
    *,
    spots: AnnData | None = None,
    key: str = "neurtv",
    layer: str | None = None,
    size_factors: str | Sequence[float] | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = None,
    vmax: float | str = "p99.5",
    size: float = 1.0,
    ax: Axes | ArrayLike | None = None,
) -> Axes | NDArray:
    """Expression of genes in space, alone or beside what was measured, on one colour scale.

    Points are tiles of the lattice they stand on (hexagons, squares), else discs as wide as the median distance to the nearest
    point; their size is in the units of the coordinates and follows the figure. y points down. NaN is not drawn, nor are spots
    marked ``in_tissue == 0``.

    Parameters
    ----------
    adata
        What :func:`neurst.tl.neurtv_superres` or :func:`neurst.tl.neurtv_query` returned, drawn from `X`; or the fitted spots, drawn from
        ``layers[key]``.
    genes
        One name, or several.
    spots
        Measured spots, drawn to the left of each field in its unit: for counts, counts / library size * `target_sum`.
    key
        Name of the fit.
    layer
        Draw this layer instead, as it is.
    size_factors
        Library sizes of `spots`. If None, the column that :func:`neurst.tl.neurtv_fit` was given, else totals over all genes.
    cmap
        Colour map.
    vmin, vmax
        Ends of the colour scale: numbers, or percentiles of the field such as ``"p99.5"``. If None, `vmin` is 0 for counts, else
        ``"p0.5"``. Where values go beyond, the colour bar is pointed.
    size
        Width of a point as a multiple of the above. In 3-d it is approximate.
    ax
        Axes to draw on, as many as are returned and in that shape; a new figure if None. Colour bars stand to the right of them: make the
        figure with ``layout="constrained"``. For 3-d positions with ``projection="3d"``.

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
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
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
    kept = slots.stored(adata, key)
    names = _drawable(adata, kept, genes, layer)
    clouds = [_field(adata, kept, key, names, layer)]
    if spots is not None:
        clouds.insert(0, _measured(spots, adata, kept, key, names, size_factors))
    vmin = _lowest(kept, layer) if vmin is None else vmin
    norms = [_draw.scale(values, vmin, vmax) for values in clouds[-1].values.T]
    shape = (*(() if isinstance(genes, str) else (len(names),)), *(() if spots is None else (2,)))
    axes = _draw.panels(shape, ax, _draw.bounds(clouds))
    for g, (row, name) in enumerate(zip(axes.reshape(len(names), -1), names, strict=True)):
        _draw.picture(
            row,
            clouds,
            g,
            titles=[name] if spots is None else [f"{name}, measured", f"{name}, field"],
            label=_unit(kept, layer),
            cmap=cmap,
            norm=norms[g],
            size=size,
        )
    return axes[()]


def _drawable(adata: AnnData, kept: slots.Stored, genes: Sequence[str] | str, layer: str | None) -> list[str]:
    """Names of `adata`, and of the fit unless a layer is to be drawn as it is."""
    fitted = set(kept.field.genes)
    return door.known_genes(genes, [g for g in adata.var_names if layer is not None or g in fitted])


def _field(adata: AnnData, kept: slots.Stored, key: str, names: list[str], layer: str | None) -> _draw.Cloud:
    """The field at the points of `adata` that are tissue."""
    layer = slots.values_layer(adata, key) if layer is None else layer
    tissue = door.in_tissue(adata)
    coords, values = door.read_coords(adata, kept.spatial_key), slots.read_genes(adata, names, layer)
    return _draw.Cloud(coords[tissue], values[tissue])


def _measured(
    spots: AnnData,
    adata: AnnData,
    kept: slots.Stored,
    key: str,
    names: list[str],
    size_factors: str | Sequence[float] | None,
) -> _draw.Cloud:
    """Measured expression in the unit of the field, at the spots that are tissue."""
    names = door.known_genes(names, list(spots.var_names))
    layer, spatial_key, column = slots.read_source(adata, key)
    size_factors = column if size_factors is None else size_factors
    tissue = door.in_tissue(spots)
    coords, values = door.read_coords(spots, spatial_key), slots.read_measured(spots, kept, names, layer, size_factors)
    if coords.shape[1] != kept.field.n_dims:
        msg = f"`spots` have {coords.shape[1]} coordinates, the field has {kept.field.n_dims}: pass the spots it was fitted to"
        raise ValueError(msg)
    return _draw.Cloud(coords[tissue], values[tissue])


def _unit(kept: slots.Stored, layer: str | None) -> str:
    if layer is not None:
        return layer
    if not kept.field.log_link:
        return "expression"
    total = kept.field.target_sum
    return f"counts (library size {total:,.0f})" if total >= 10 else f"counts (library size {total:.2g})"


def _lowest(kept: slots.Stored, layer: str | None) -> float | str:
    return 0.0 if kept.field.log_link and layer is None else "p0.5"


def gradient(
    adata: AnnData,
    genes: Sequence[str] | str | None = None,
    *,
    key: str = "neurtv",
    arrows: int = 20,
    cmap: str | Colormap | None = None,
    vmin: float | str | None = None,
    vmax: float | str = "p99.5",
    size: float = 1.0,
    ax: Axes | ArrayLike | None = None,
) -> Axes | NDArray:
    """Where expression changes: a map of all boundaries, or genes with arrows that point uphill.

    Parameters
    ----------
    adata
        Fitted spots, or a dense AnnData of the field, after :func:`neurst.tl.neurtv_gradient`.
    genes
        One name, or several: expression with arrows for ``layers["<key>_dx"]`` and ``["<key>_dy"]`` at some of its points, of
        length proportional to the derivative. If None, the map of ``obs["<key>_edge"]``, over all genes together.
    key
        Name of the fit.
    arrows
        Arrows along the longer side of the tissue.
    cmap
        Colour map; ``"viridis"`` for genes, ``"magma"`` for boundaries if None.
    vmin, vmax, size, ax
        As in :func:`superres`.

    Returns
    -------
    One Axes for one name or None, an array (G,) for several.

    Raises
    ------
    KeyError, ValueError
        If there is no such fit or gene, no gradient was stored, or arrows are asked for in 3-d.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_gradient(adata)
    >>> neurst.pl.gradient(adata).get_title()
    'Boundaries'
    >>> neurst.pl.gradient(adata, "Layer2_01").get_title()
    'Layer2_01'
    """
    if arrows < 1:
        msg = f"`arrows={arrows!r}`: expected a number >= 1, of arrows along the longer side"
        raise ValueError(msg)
    kept = slots.stored(adata, key)
    if genes is None:
        cloud = _edge(adata, kept, key)
        norm = _draw.scale(cloud.values, 0.0 if vmin is None else vmin, vmax)
        axes = _draw.panels((), ax, _draw.bounds([cloud]))
        style = {"cmap": "magma" if cmap is None else cmap, "norm": norm, "size": size}
        _draw.picture(
            axes.reshape(1), [cloud], 0, titles=["Boundaries"], label="edge strength per unit length", **style
        )
        return axes.item()
    names = _drawable(adata, kept, genes, None)
    if kept.field.n_dims == 3:
        msg = "`genes`: arrows of 3-d positions cannot be read in a picture; call `neurst.pl.gradient(adata)` for the boundary map"
        raise ValueError(msg)
    slopes = slots.read_gradient(adata, key, names, 2)[door.in_tissue(adata)]
    cmap = "viridis" if cmap is None else cmap
    axes = superres(adata, genes, key=key, cmap=cmap, vmin=vmin, vmax=vmax, size=size, ax=ax)
    cloud = _field(adata, kept, key, names, None)
    for g, a in enumerate(np.ravel(np.asarray(axes, dtype=object))):
        drawn = np.isfinite(cloud.values[:, g])
        if drawn.any():
            _draw.draw_arrows(a, cloud.coords[drawn], slopes[drawn, g], across=arrows)
    return axes


def _edge(adata: AnnData, kept: slots.Stored, key: str) -> _draw.Cloud:
    """The boundary map at the points of `adata` that are tissue."""
    tissue = door.in_tissue(adata)
    return _draw.Cloud(door.read_coords(adata, kept.spatial_key)[tissue], slots.read_edge(adata, key)[tissue, None])


def history(adata: AnnData, *, key: str = "neurtv", ax: ArrayLike | None = None) -> NDArray:
    """How a field was fitted: the course of the final fits, and the choice of `lam`.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``.
    key
        Name of the fit.
    ax
        Array of two Axes to draw on; a new figure if None.

    Returns
    -------
    Array of two Axes. Against the step, for each member, means over ten steps: objective and negative log-likelihood in nats and, on an axis of its own to
    the right, the penalty in box units, not multiplied by `lam`. Against the prior strength, for each penalty: the
    held-out score of each one tried by short fits, and a line at that of the final fits: the one given, or
    chosen (for counts 1.5 times the vertex of those scores).

    Raises
    ------
    KeyError, ValueError
        If there is no fit under `key`, or `ax` has another shape.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.pl.history(adata).shape
    (2,)
    """
    kept = slots.stored(adata, key)
    trace, search, lam = slots.read_history(adata, key)
    axes = _draw.panels((2,), ax, np.array([[0.0, 0.0], [1.0, 0.8]]))
    _draw_course(axes[0], trace)
    _draw_choice(axes[1], search, lam, "deviance" if kept.field.log_link else "variance")
    return axes


def _draw_course(ax: Axes, trace: Mapping[str, NDArray]) -> None:
    right, member = ax.twinx(), np.asarray(trace["member"])
    for m in np.unique(member):
        step, objective, likelihood, penalty = (
            np.asarray(trace[name])[member == m] for name in ("step", "objective", "likelihood", "penalty")
        )
        ax.plot(step, objective, color="black", label=None if m else "objective")
        ax.plot(step, likelihood, color="C0", label=None if m else "likelihood")
        right.plot(step, penalty, color="C1")
    ax.set(xlabel="step", ylabel="nats", title="Final fits" if member.any() else "Final fit")
    right.set_ylim(0, 1.35 * max(trace["penalty"]) or 1.0)  # below the legend
    right.set_ylabel("penalty", color="C1")
    right.tick_params(axis="y", colors="C1")
    for a in (ax, right):
        a.spines["top"].set_visible(False)
    ax.legend(frameon=False, loc="upper right")


def _draw_choice(ax: Axes, search: Mapping[str, NDArray], lam: Mapping[str, float], what: str) -> None:
    names, tried, scores = (np.asarray(search[name]) for name in ("penalty", "lam", "score"))
    for k, (name, chosen) in enumerate(lam.items()):
        ax.plot(tried[names == name], scores[names == name], "o-", color=f"C{k}", markersize=4)
        ax.axvline(chosen, color=f"C{k}", linestyle="--", linewidth=1, label=f"{name.replace('_', '-')}, {chosen:.3g}")
    ax.set(xscale="log", xlabel="lam (nats)", ylabel=f"held-out {what} explained", title="Prior strength")
    ticks = np.unique(tried)
    ticks = ticks[:: 1 + len(ticks) // 6]
    ax.set_xticks(ticks, [f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in ticks])
    ax.set_xticks([], minor=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
