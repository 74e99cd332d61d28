"""Figures of held-out scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from neurst.core.arguments import ANYTHING, TEXT, checked
from neurst.pl import _draw
from neurst.spatial.adata.read import ADATA
from neurst.spatial.adata.results import read_scores
from neurst.spatial.evaluate.compare import best_baseline

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LOWEST = -0.5  # lower scores of genes are drawn at this value
TICK = 0.25  # distance between ticks for scores of genes
COLOURS = {True: "C1", False: "0.45"}  # the field, other methods
NAMES = {"no_tv": "field without TV", "lognorm": "field, log-normalised", "kriging_log": "kriging, log-normalised"}


@checked(adata=ADATA, key=TEXT.advised("the `key_added` of held-out scores"), ax=ANYTHING)
def holdout_score(adata: AnnData, *, key: str = "holdout_score", ax: ArrayLike | None = None) -> NDArray:
    """How well hidden spots were predicted: by all methods, and for each gene by the field and the best baseline.

    Parameters
    ----------
    adata
        The AnnData to which :func:`neurst.tl.holdout_score` wrote scores under the name `key`, in ``uns`` and
        ``var``.
    key
        Name of the scores.
    ax
        As in :func:`history`.

    Returns
    -------
    Array of two Axes. The first one shows the share explained by each method, the best on top: a dot for each seed, and a line at their
    mean. The second one shows, for each gene, the share explained by the field against that by the best baseline, with lines where both are
    equal and where either is 0; shares below -0.5 are drawn at -0.5.

    Raises
    ------
    KeyError, ValueError
        If there are no scores under `key`, they are damaged, or `ax` is not an array of two Axes.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.holdout_score(adata, baselines="kernel", lam=400, steps=20, progress=False)
    >>> neurst.pl.holdout_score(adata).shape
    (2,)
    """
    table, field, baseline = read_scores(adata, key)
    axes = _draw.panels((2,), ax, np.array([[0.0, 0.0], [1.0, 1.0]]))
    _draw_methods(axes[0], table)
    _draw_genes(axes[1], field, baseline, best_baseline(list(zip(table["method"], table["score"], strict=True))))
    return axes


def _draw_methods(ax: Axes, table: pd.DataFrame) -> None:
    means = table.groupby("method")["score"].mean().sort_values()
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    for row, (method, mean) in enumerate(means.items()):
        colour, scores = COLOURS[method == "field"], table.loc[table["method"] == method, "score"].to_numpy()
        ax.vlines(mean, row - 0.3, row + 0.3, color=colour, linewidth=2)
        ax.plot(scores, np.full(len(scores), row), "o", color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
    ax.set_yticks(range(len(means)), [_name(method) for method in means.index])
    title = "Hidden blocks" if str(table["holdout"].iloc[0]) == "block" else "Hidden spots"
    ax.set(ylim=(-0.6, len(means) - 0.4), xlabel="share explained, all genes", title=title)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _name(method: str) -> str:
    return NAMES.get(method, method)


def _draw_genes(ax: Axes, field: NDArray, baseline: NDArray, name: str | None) -> None:
    known = np.isfinite(field) & np.isfinite(baseline)
    x, y = (np.maximum(scores[known], LOWEST) for scores in (baseline, field))
    low, high = min(0.0, x.min(initial=0), y.min(initial=0)) - 0.03, max(0.2, x.max(initial=0), y.max(initial=0)) + 0.03
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.scatter(x, y, s=14, color=COLOURS[True], alpha=0.6, linewidths=0, rasterized=len(x) > 2000)
    ax.text(0.04, 0.96, f"{(field[known] > baseline[known]).sum()} of {len(x)} above", transform=ax.transAxes, va="top")
    ticks = np.arange(np.ceil(low / TICK), np.floor(high / TICK) + 1) * TICK
    ax.set(
        xlim=(low, high),
        ylim=(low, high),
        xticks=ticks,
        yticks=ticks,
        xlabel=_name(name or "no baseline"),
        ylabel="field",
    )
    ax.set_title("Share explained, by gene")
    ax.set_aspect("equal")
    ax.spines[["top", "right"]].set_visible(False)
