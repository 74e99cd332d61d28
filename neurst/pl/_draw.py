"""Parts of figures: points whose size is in the units of the coordinates, colour scales, arrows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurst.core.arguments import Rule, shown
from neurst.spatial.geometry import STEPS, Geometry, geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.path import Path
    from matplotlib.quiver import Quiver

WIDTH = 3.0  # width of a panel, in inches
COLUMNS = 4  # most panels side by side
ASPECTS = 0.65, 2.0  # least and largest height of a new panel, in widths; below, colour bar labels do not fit
FAINT = 0.05  # shorter arrows, relative to the longest, would look like dots and are not drawn


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points and the values that are drawn at them."""

    coords: NDArray  # (N, d)
    values: NDArray  # (N, G)

    @cached_property
    def layout(self) -> Geometry:
        """The lattice of the points, or their spacing if irregular; a pitch of 1 if there are fewer than 4."""
        if len(np.unique(self.coords, axis=0)) < 4:
            d = self.coords.shape[1]
            return Geometry("irregular", 1.0, np.eye(d), self.coords[0], 1.0)
        return geometry(self.coords)


def _colour_map(value: Any) -> Any:
    import matplotlib
    from matplotlib.colors import Colormap

    if isinstance(value, Colormap):
        return value
    if not isinstance(value, str):
        raise TypeError
    if value not in matplotlib.colormaps:
        raise ValueError
    return str(value)


CMAP = Rule(("the name of a colour map of matplotlib, such as 'viridis'", "a Colormap"), _colour_map)


def bounds(clouds: Sequence[Cloud]) -> NDArray:  # -> (2, d)
    """Lower and upper corner of all points, with a margin."""
    if any(len(cloud.coords) == 0 for cloud in clouds):
        msg = "`adata` holds no spot in the tissue that could be drawn: expected at least one; look for a filter that dropped them all"
        raise ValueError(msg)
    low = np.min([c.coords.min(0) - c.layout.pitch for c in clouds], axis=0)
    return np.stack([low, np.max([c.coords.max(0) + c.layout.pitch for c in clouds], axis=0)])


def panels(shape: tuple[int, ...], ax: Any, limits: NDArray) -> NDArray:
    """An array of Axes of this shape: `ax` if given, else those of a new figure with the aspect of `limits` (2, d)."""
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
    others = [a for a in axes.flat if not hasattr(a, "get_xlim")]
    if others:
        msg = f"`ax` holds {shown(others[0])}: expected Axes of matplotlib"
        raise TypeError(msg)
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
    # unlike "constrained", "compressed" leaves no gaps between panels of equal aspect
    figure = plt.figure(figsize=(columns * (WIDTH + 0.6), rows * (WIDTH * aspect + 0.4)), layout="compressed")
    figure.get_layout_engine().set(wspace=0.04)
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": projection})
    for spare in grid.flat[n:]:
        spare.remove()
    return grid.ravel()[:n].reshape(shape)


def tile(cloud: Cloud, size: float = 1.0) -> Path:
    r"""Outline of a point in the units of the coordinates, centred at zero. Tiles of `size` 1 fill the plane of a lattice.

    On a lattice it is the polygon with corners :math:`(n_k + n_{k+1}) / m`, where n are the steps to neighbours, anticlockwise, and m = 3
    (hexagonal) or 2 (square): copies at all lattice points meet without overlap. Otherwise it is a disc as wide as the pitch.
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
    """Draw column `g` of each cloud on its own Axes, with the same limits and the same colour scale."""
    limits = bounds(clouds)
    for ax, cloud, title in zip(axes, clouds, titles, strict=True):
        points = draw_points(ax, cloud, g, cmap=cmap, norm=norm, size=size)
        frame(ax, limits, title)
    colour_bar(axes[-1], points, label, np.concatenate([cloud.values[:, g] for cloud in clouds]))


def draw_points(ax: Axes, cloud: Cloud, g: int, *, cmap: str | Colormap, norm: Normalize, size: float) -> Collection:
    """Draw coloured points as one rasterised collection; NaN is not drawn."""
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
        antialiased=Path.CURVE4 in outline.codes,  # only for discs: tiles would get visible seams
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
    """Set limits (2, d), one scale for all axes, y downwards as in images (not in 3-d), and no ticks."""
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
    """Add a colour bar as high as the panel, with pointed ends where the values `shown` go beyond its limits."""
    low, high, known = points.norm.vmin, points.norm.vmax, shown[np.isfinite(shown)]
    beyond = bool((known < low).any()), bool((known > high).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    place = ax.inset_axes([1.03, 0, 0.04, 1])  # keeps the height of the panel, whatever its aspect
    bar = ax.figure.colorbar(points, cax=place, label=label, extend=extend, extendfrac=0.03)
    bar.outline.set_visible(False)
    return bar


def thin(coords: NDArray, across: int) -> NDArray:
    """Rows of evenly spread points: with `across` squares along the longer side, the point nearest the centre of each square."""
    at = (coords - coords.min(0)) / _square(coords, across)
    order = np.argsort(np.linalg.norm(at - np.floor(at) - 0.5, axis=1), kind="stable")
    _, first = np.unique(np.floor(at[order]), axis=0, return_index=True)
    return np.sort(order[first])


def _square(coords: NDArray, across: int) -> float:
    return (np.ptp(coords, axis=0).max() or 1.0) / across


def draw_arrows(ax: Axes, coords: NDArray, gradient: NDArray, *, across: int) -> Quiver:
    """Draw arrows for the gradient (N, 2) at some of the points, see :func:`thin`; the longest ones are two squares long."""
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
