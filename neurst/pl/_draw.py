"""Artists: points whose size is in the units of the coordinates, colour scales, arrows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurst.spatial.tissue import STEPS, Geometry, geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.path import Path
    from matplotlib.quiver import Quiver

WIDTH = 3.0  # of a panel, in inches
COLUMNS = 4  # most panels side by side
ASPECTS = 0.65, 2.0  # least and largest height of a new panel, in widths; the label of a colour bar needs the least
FAINT = 0.05  # arrows shorter than this, relative to the longest, would be dots


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points and what is drawn at them."""

    coords: NDArray  # (N, d)
    values: NDArray  # (N, G)

    @cached_property
    def layout(self) -> Geometry:
        """The lattice they stand on, if any; a pitch of 1 if they are too few to tell."""
        if len(np.unique(self.coords, axis=0)) < 4:
            d = self.coords.shape[1]
            return Geometry("irregular", 1.0, np.eye(d), self.coords[0], 1.0)
        return geometry(self.coords)


def bounds(clouds: Sequence[Cloud]) -> NDArray:  # -> (2, d)
    """Lower and upper corner of all points, with a margin."""
    low = np.min([c.coords.min(0) - c.layout.pitch for c in clouds], axis=0)
    return np.stack([low, np.max([c.coords.max(0) + c.layout.pitch for c in clouds], axis=0)])


def panels(shape: tuple[int, ...], ax: Any, limits: NDArray) -> NDArray:
    """Axes in an array of `shape`: those given, or those of a new figure, with panels as high as `limits` (2, d) needs."""
    d = limits.shape[1]
    projection = "3d" if d == 3 else "rectilinear"
    if ax is None:
        width, height = np.ptp(limits[:, :2], axis=0)
        return new_axes(shape, 1.0 if d == 3 else float(np.clip(height / width, *ASPECTS)), projection)
    axes = np.asarray(ax, dtype=object)
    if axes.shape != shape:
        names = ["one Axes" if s == () else f"an array of Axes of shape {s}" for s in (axes.shape, shape)]
        msg = f"`ax` is {names[0]}: expected {names[1]}"
        raise ValueError(msg)
    wrong = [a.name for a in axes.flat if a.name != projection]
    if wrong:
        msg = f"`ax` has projection {wrong[0]!r}: positions in {d}-d need Axes with projection={projection!r}"
        raise ValueError(msg)
    return axes


def new_axes(shape: tuple[int, ...], aspect: float, projection: str = "rectilinear") -> NDArray:
    """Axes of a new figure, row by row, each `aspect` times as high as wide."""
    from matplotlib import pyplot as plt

    n = int(np.prod(shape))
    columns = min(n, COLUMNS)
    rows = -(-n // columns)
    # compressed: as constrained, without the gaps that panels of equal aspect would leave
    figure = plt.figure(figsize=(columns * (WIDTH + 0.6), rows * (WIDTH * aspect + 0.4)), layout="compressed")
    figure.get_layout_engine().set(wspace=0.04)
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": projection})
    for spare in grid.flat[n:]:
        spare.remove()
    return grid.ravel()[:n].reshape(shape)


def tile(cloud: Cloud, size: float = 1.0) -> Path:
    r"""Outline of a point in the units of the coordinates, centred at zero, `size` times what fills the plane.

    On a lattice, the polygon with corners :math:`(n_k + n_{k+1}) / m` for the steps n to neighbours, anticlockwise, and m = 3
    (hexagonal) or 2 (square): its copies at all lattice points meet without overlap. Else a disc as wide as the pitch.
    """
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    if cloud.layout.kind == "irregular":
        return Path.unit_circle().transformed(Affine2D().scale(size * cloud.layout.pitch / 2))
    steps = STEPS[cloud.layout.kind] @ cloud.layout.basis
    corners = size * (steps + np.roll(steps, -1, axis=0)) / {"hexagonal": 3, "square": 2}[cloud.layout.kind]
    return Path(np.concatenate([corners, corners[:1]]), closed=True)


def picture(
    axes: NDArray,
    clouds: Sequence[Cloud],
    g: int,
    *,
    titles: Sequence[str],
    label: str,
    cmap: str | Colormap,
    norm: Normalize,
    size: float,
) -> None:
    """Column `g` of each cloud on Axes of its own, within the same limits and on the same colour scale."""
    limits = bounds(clouds)
    for ax, cloud, title in zip(axes, clouds, titles, strict=True):
        points = draw_points(ax, cloud, g, cmap=cmap, norm=norm, size=size)
        frame(ax, limits, title)
    colour_bar(axes[-1], points, label, np.concatenate([cloud.values[:, g] for cloud in clouds]))


def draw_points(ax: Axes, cloud: Cloud, g: int, *, cmap: str | Colormap, norm: Normalize, size: float) -> Collection:
    """Coloured points, as one rasterised collection; NaN is not drawn."""
    if cloud.coords.shape[1] == 3:
        return _draw_points_3d(ax, cloud, g, cmap=cmap, norm=norm, size=size)
    from matplotlib.collections import PathCollection
    from matplotlib.path import Path
    from matplotlib.transforms import AffineDeltaTransform

    outline = tile(cloud, size)
    points = PathCollection(
        [outline],
        offsets=cloud.coords,
        offset_transform=ax.transData,
        transform=AffineDeltaTransform(ax.transData),  # the outline is in data units
        array=np.ma.masked_invalid(cloud.values[:, g]),
        cmap=cmap,
        norm=norm,
        linewidths=0,
        antialiased=Path.CURVE4 in outline.codes,  # discs only: between tiles it would leave seams
        rasterized=True,
    )
    ax.add_collection(points, autolim=False)
    return points


def _draw_points_3d(
    ax: Axes, cloud: Cloud, g: int, *, cmap: str | Colormap, norm: Normalize, size: float
) -> Collection:
    share = size * cloud.layout.pitch / np.ptp(bounds([cloud]), axis=0).max()
    width = 72 * ax.bbox.width / ax.figure.dpi * share  # points on paper
    drawn = np.isfinite(cloud.values[:, g])
    return ax.scatter(
        *cloud.coords[drawn].T,
        c=cloud.values[drawn, g],
        s=width**2,
        cmap=cmap,
        norm=norm,
        linewidths=0,
        depthshade=False,
        rasterized=True,
    )


def frame(ax: Axes, limits: NDArray, title: str) -> None:
    """Limits (2, d), one scale for all axes, y downwards as in pictures (not in 3-d), no ticks."""
    low, high = limits
    ax.set(xlim=(low[0], high[0]), xticks=[], yticks=[], title=title)
    if len(low) == 3:
        ax.set(ylim=(low[1], high[1]), zlim=(low[2], high[2]), zticks=[])
    else:
        ax.set_ylim(high[1], low[1])
        ax.spines[:].set_visible(False)
    ax.set_aspect("equal")


def scale(values: NDArray, vmin: float | str, vmax: float | str) -> Normalize:
    """Linear colour scale; limits are numbers, or percentiles of the values such as ``"p99.5"``."""
    from matplotlib.colors import Normalize

    known = values[np.isfinite(values)]
    low, high = (_limit(name, v, known) for name, v in {"vmin": vmin, "vmax": vmax}.items())
    if low > high:
        msg = f"`vmin={vmin!r}` is {low:.4g}, above `vmax={vmax!r}`, which is {high:.4g}: pass a lower `vmin` or a higher `vmax`"
        raise ValueError(msg)
    return Normalize(low, high if high > low else low + (abs(low) or 1.0))


def _limit(name: str, limit: float | str, values: NDArray) -> float:
    try:
        if not isinstance(limit, str):
            return float(limit)
        if limit.startswith("p"):
            return float(np.percentile(values, float(limit[1:]))) if len(values) else 0.0
    except (TypeError, ValueError):
        pass
    msg = f"`{name}={limit!r}`: expected a number, or a percentile between 0 and 100 such as 'p99.5'"
    raise ValueError(msg)


def colour_bar(ax: Axes, points: Collection, label: str, shown: NDArray) -> Colorbar:
    """A colour bar as high as the panel, pointed where values `shown` go beyond it."""
    low, high, known = points.norm.vmin, points.norm.vmax, shown[np.isfinite(shown)]
    beyond = bool((known < low).any()), bool((known > high).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    place = ax.inset_axes([1.03, 0, 0.04, 1])  # follows the panel whatever its aspect
    bar = ax.figure.colorbar(points, cax=place, label=label, extend=extend, extendfrac=0.03)
    bar.outline.set_visible(False)
    return bar


def thin(coords: NDArray, across: int) -> NDArray:
    """Rows of points about evenly spread, `across` along the longer side: the one nearest the centre of each square."""
    at = (coords - coords.min(0)) / _square(coords, across)
    order = np.argsort(np.linalg.norm(at - np.floor(at) - 0.5, axis=1), kind="stable")
    _, first = np.unique(np.floor(at[order]), axis=0, return_index=True)
    return np.sort(order[first])


def _square(coords: NDArray, across: int) -> float:
    return (np.ptp(coords, axis=0).max() or 1.0) / across


def draw_arrows(ax: Axes, coords: NDArray, gradient: NDArray, *, across: int) -> Quiver:
    """Arrows at thinned points, length and direction those of the gradient (N, 2); the longest ones span two squares."""
    rows = thin(coords, across)
    length = np.linalg.norm(gradient[rows], axis=1)
    longest = np.percentile(length, 98)
    rows = rows[length >= FAINT * longest]
    square = _square(coords, across)
    return ax.quiver(
        *coords[rows].T,
        *gradient[rows].T,
        angles="xy",
        scale_units="xy",
        scale=longest / (2 * square) or 1.0,
        units="xy",
        width=0.1 * square,
        minlength=0,
        pivot="mid",
        color="white",
        edgecolor="black",
        linewidth=0.3,
    )
