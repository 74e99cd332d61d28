"""Artists: points of known size in the units of the coordinates, colour scales, arrows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurst.spatial.tissue import STEPS, geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PathCollection
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.path import Path
    from matplotlib.quiver import Quiver

WIDTH = 3.0  # of a panel, in inches
COLUMNS = 4  # most panels side by side


def panels(shape: tuple[int, ...], ax: Any, coords: NDArray) -> NDArray:
    """Axes in an array of `shape`: those given, or those of a new figure whose panels have the shape of the tissue."""
    projection = "3d" if coords.shape[1] == 3 else "rectilinear"
    if ax is None:
        width, height = np.ptp(coords[:, :2], axis=0)
        aspect = np.clip(height / width, 0.25, 4) if projection != "3d" and width > 0 else 1.0
        return new_axes(shape, aspect, projection)
    axes = np.asarray(ax, dtype=object)
    if axes.shape != shape:
        expected = "one Axes" if shape == () else f"an array of Axes of shape {shape}"
        msg = f"`ax` has shape {axes.shape}: expected {expected}"
        raise ValueError(msg)
    wrong = [a.name for a in axes.flat if a.name != projection]
    if wrong:
        msg = f"`ax` has projection {wrong[0]!r}: positions in {coords.shape[1]}-d need {projection!r}"
        raise ValueError(msg)
    return axes


def new_axes(shape: tuple[int, ...], aspect: float, projection: str = "rectilinear") -> NDArray:
    """Axes of a new figure, row by row, with panels `aspect` times as high as wide."""
    from matplotlib import pyplot as plt

    n = int(np.prod(shape))
    columns = min(n, COLUMNS)
    rows = -(-n // columns)
    size = (columns * (WIDTH + 0.5), rows * (WIDTH * aspect + 0.3))
    # compressed: as constrained, without the gaps that panels of equal aspect would leave
    figure = plt.figure(figsize=size, layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": projection})
    for spare in grid.flat[n:]:
        spare.remove()
    return np.array(grid.flat[:n], dtype=object).reshape(shape)


def tile(coords: NDArray, size: float = 1.0) -> Path:
    r"""Outline of a point in the units of the coordinates, centred at zero.

    On a lattice, the polygon with corners :math:`(n_k + n_{k+1}) / m` between neighbouring steps n, m = 3 (hexagonal) or 2
    (square): copies at all lattice points fill the plane once. Off a lattice, a disc as wide as the pitch. All times `size`.
    """
    from matplotlib.path import Path

    layout = geometry(coords)
    if layout.kind == "irregular":
        return Path.unit_circle().transformed(_scaling(size * pitch(coords) / 2))
    steps = STEPS[layout.kind] @ layout.basis
    corners = (steps + np.roll(steps, -1, axis=0)) * size / (len(steps) / 2 if len(steps) == 6 else 2)
    return Path(np.concatenate([corners, corners[:1]]), closed=True)
