r"""Surfaces from points: a signed distance whose zero is the surface."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from neurst.core.fit import Affine, Field, FitConfig, fit_field
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Network, Spline, as_network
from neurst.core.penalty import Eikonal
from neurst.core.samples import Box, Samples
from neurst.core.search import climb
from neurst.imaging.mesh import BLOCK, zero_set
from neurst.imaging.planes import local_planes, noise_along, patch_size, spacing_of, turned_alike
from neurst.imaging.points import READ_AT_ONCE, checked_points, progress_stages

LEAST_POINTS = 20
LEAST_NOISE = 1e-4  # in box units: exact points are not fitted closer


@dataclass(frozen=True)
class SurfaceFit:
    """Numbers of a surface fit.

    Parameters
    ----------
    levels, most_cells
        Grids of the spline where ``network="auto"``, each twice as fine as the one before, and most cells a side of the finest; where points
        are sparser than that its cells are two spacings of the points.
    start, ratio, reach
        First `bend` that is tried, in spacings, the factor between neighbours, and most neighbours looked at in one direction.
    fraction
        Share of the points held out in the search.
    neighbours, flat, most_neighbours
        Points of a local plane; twice, and up to so many times that, where noise makes the typical patch thicker: its variance along the
        normal, as a share of that along it.
    steps, short_steps
        Adam steps of the fit, and of one in the search for `bend`.
    anchors
        Places off the surface, per point, where the distance to the local planes is a soft observation.
    tolerance
        Its standard deviation: so many spacings of the points, so many times their noise, and that share of the distance.
    learning_rate, network_rate
        At the first step of each, of a spline and of another network.
    batch_points, n_regularisation
        Points and regularisation points drawn for one step.
    near, jitter
        Share of the regularisation points near the points, and their standard deviation in spacings; the rest covers the box.
    margin
        Room left around the points, as a share of the longest side of their bounding box.
    """

    levels: int = 4
    most_cells: int = 128
    start: float = 2.0
    ratio: float = 2.0
    reach: int = 2
    fraction: float = 0.2
    neighbours: int = 12
    flat: float = 0.15
    most_neighbours: int = 48
    steps: int = 300
    short_steps: int = 150
    anchors: float = 2.0
    tolerance: tuple[float, float, float] = (1.0, 2.0, 0.05)
    learning_rate: float = 1e-2
    network_rate: float = 2e-3
    batch_points: int = 4096
    n_regularisation: int = 1024
    near: float = 0.9
    jitter: float = 1.0
    margin: float = 0.05


@dataclass(frozen=True, eq=False)
class Surface:
    """A surface as the zero of a signed distance: negative inside, positive outside.

    Parameters
    ----------
    field
        Signed distance in box units, read at coordinates in the points' units.
    sigma
        Noise of the points along the normal, in their units.
    points
        (N, d) the points it was fitted to.
    low, high
        (d,) corners of the region that was fitted: the bounding box with its margin.
    bend
        Length in box units over which normals turn, given or chosen.
    """

    field: Field
    sigma: float
    points: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    bend: float

    def _read(self, read: Callable[[torch.Tensor], torch.Tensor], query: ArrayLike) -> NDArray[np.float64]:
        query = torch.from_numpy(checked_points("query", query, len(self.low)))
        return torch.cat([read(part).double() for part in query.split(READ_AT_ONCE)]).numpy()

    def distance(self, query: ArrayLike) -> NDArray[np.float64]:
        """Signed distance (Q,) at points (Q, d), both in the same unit."""
        return self.field.box.scale * self._read(self.field, query)[:, 0]

    def normals(self, query: ArrayLike) -> NDArray[np.float64]:
        """Unit normals (Q, d) of the level set through each point (Q, d), outwards."""
        slope = self._read(self.field.jacobian, query)[:, 0]
        return slope / np.linalg.norm(slope, axis=1, keepdims=True)

    def project(self, query: ArrayLike, *, n_iter: int = 5) -> NDArray[np.float64]:
        r"""Points (Q, d) moved onto the surface by Newton's steps along the normal, :math:`x - f \nabla f / \|\nabla f\|^2`."""
        x = checked_points("query", query, len(self.low))
        for _ in range(n_iter):
            slope = self.field.box.scale * self._read(self.field.jacobian, x)[:, 0]
            x = x - (self.distance(x) / np.square(slope).sum(1))[:, None] * slope
        return x

    def mesh(
        self, resolution: int = 128, *, within: float | str | None = "auto"
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Triangles of the zero set by marching cubes :cite:p:`Lewiner2003`.

        Parameters
        ----------
        resolution
            Lattice cells along the longest side. Only blocks that the surface may cross are read, and pieces of the zero set that come
            near no point are left out.
        within
            Leave out triangles farther than this from every point, in their units, so that holes in the points stay open; None closes
            them. ``"auto"`` leaves out holes of the points: places farther from the nearest point than this one from its twelfth neighbour, and
            around them those that have points on one side only. It holds for any density, varying ones too, and takes no gap of points at
            random for a hole.

        Returns
        -------
        Vertices (V, 3) in the points' units, and faces (F, 3) counter-clockwise seen from outside.
        """
        if len(self.low) != 3:
            msg = f"`mesh` needs a surface in 3 dimensions, this one has {len(self.low)}: read `distance` on a lattice, and trace its zero"
            raise ValueError(msg)
        if not (isinstance(resolution, Integral) and resolution >= BLOCK):
            msg = f"`resolution={resolution!r}`: expected a whole number >= {BLOCK}"
            raise ValueError(msg)
        if not (within is None or within == "auto" or (isinstance(within, Real) and 0 < within < math.inf)):
            msg = f"`within={within!r}`: expected a positive distance in the units of the points, 'auto', or None to close all holes"
            raise ValueError(msg)
        return zero_set(self.distance, self.low, self.high, self.points, resolution, within)


def fit_surface(
    points: ArrayLike,
    normals: ArrayLike | None = None,
    *,
    sigma: float | None = None,
    lam: float = 3.0,
    bend: float | str = "auto",
    network: str | Network = "auto",
    steps: int | str = "auto",
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Surface:
    r"""A surface from noisy points, as the zero of a signed distance f.

    Minimises :math:`\sum_i \tfrac12 (f(x_i) / \sigma)^2 + \lambda N\,\mathrm{mean}_x (\|\nabla f\| - 1)^2 + (b \|\nabla^2 f\|_F)^2`, in units of
    the box (half the longest side of the points' bounding box is 1): the eikonal equation makes f a distance :cite:p:`Gropp2020`, and
    the Hessian is the derivative of the normals, so that b weighs the bending energy of the surface. Distances to local planes, as soft
    observations off the surface, say which side is outside. The noise of the points flattens f; at the end it is divided by its
    typical slope.

    Parameters
    ----------
    points
        (N, d), d = 2 or 3, one length unit for all axes.
    normals
        (N, d), outwards, of any length: they only say which side is outside. If None they are those of the planes through the nearest
        points, turned alike along a minimum spanning tree :cite:p:`Hoppe1992`, and outwards by what is seen from outside.
    sigma
        Standard deviation of the points along the normal, in their units. If None it is estimated from the planes through the
        nearest points.
    lam
        Prior strength in nats for each point, > 0.
    bend
        b, a length in box units: larger is smoother. ``"auto"`` holds points out, and takes the one that says most of where they lie.
    network
        A name of :data:`neurst.core.nets.NETWORKS`, a network, or ``"auto"``: a spline as fine as the points are dense.
    steps
        Adam steps, or ``"auto"``.
    random_state
        Seed of every draw.
    device
        ``"auto"``, or a torch device name.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        If an argument does not fit: the message names it, what was found and what to do.

    Examples
    --------
    >>> import numpy as np
    >>> angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    >>> circle = 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
    >>> surface = fit_surface(circle, steps=50, progress=False)
    >>> surface.distance([[0.0, 0.0], [4.0, 0.0]]).shape
    (2,)
    """
    points = checked_points("points", points)
    numbers = SurfaceFit()
    _check_surface(points, lam, bend, steps)
    k = patch_size(points, numbers.neighbours, numbers.flat, numbers.most_neighbours)
    _, frame, spread = local_planes(points, k)
    normals = turned_alike(points, frame, numbers.neighbours) if normals is None else _checked_normals(normals, points)
    if sigma is None:
        sigma = noise_along(spread, k, points.shape[1])
    elif not (isinstance(sigma, Real) and 0 < sigma < math.inf):
        msg = f"`sigma={sigma!r}`: expected a positive number in the units of `points`"
        raise ValueError(msg)
    low, high = points.min(0), points.max(0)
    room = numbers.margin * (high - low).max()
    low, high = low - room, high + room
    box = Box.of(torch.from_numpy(np.stack([low, high])))
    sigma = max(float(sigma), LEAST_NOISE * box.scale)
    spacing = spacing_of(points) / box.scale
    network = _grids(spacing, (high - low) / (high - low).max(), numbers) if network == "auto" else as_network(network)
    config = FitConfig(
        steps=numbers.steps if steps == "auto" else steps,
        learning_rate=numbers.learning_rate if isinstance(network, Spline) else numbers.network_rate,
        batch_points=numbers.batch_points,
        n_regularisation=numbers.n_regularisation,
        near=numbers.near,
        jitter=numbers.jitter,
        random_state=random_state,
        device=device,
    )

    def fit(rows: NDArray, bend: float, config: FitConfig, on_step: Callable[[int, float], None]) -> Surface:
        shown = points[rows]
        samples = _samples(shown, normals[rows], k, sigma, box, (low, high), numbers, random_state)
        field = fit_field(
            samples,
            network=network,
            likelihood=Gaussian(sigma / box.scale),
            penalty=Eikonal(bend),
            lam=lam * len(rows),
            box=box,
            region=torch.from_numpy(shown),
            config=config,
            on_step=on_step,
        )
        return Surface(_steepened(field, shown, frame[rows]), sigma, shown, low, high, float(bend))

    with progress_stages(progress) as stage:
        if bend == "auto":
            order = np.random.default_rng(random_state).permutation(len(points))
            hidden, shown = np.split(order, [round(numbers.fraction * len(points))])
            short = dataclasses.replace(config, steps=min(config.steps, numbers.short_steps))

            def score(bend: float) -> float:
                trial = fit(shown, bend, short, stage(f"bend {bend:.2g}", short.steps))
                return -float(np.abs(trial.distance(points[hidden])).mean() / sigma)

            bend, _ = climb(score, start=numbers.start * spacing, ratio=numbers.ratio, reach=numbers.reach)
        return fit(np.arange(len(points)), bend, config, stage("surface", config.steps))


def _steepened(field: Field, points: NDArray, frame: NDArray) -> Field:
    """A field of typical slope 1 along the planes' normals: their noise flattens it, as it does any line through noisy abscissae."""
    parts = zip(*(torch.from_numpy(a).split(READ_AT_ONCE) for a in (points, frame)), strict=True)
    slope = torch.cat([(field.latent_jacobian(x)[:, 0] * normal).sum(1).abs() for x, normal in parts])
    return dataclasses.replace(field, head=Affine(torch.zeros(1), (1 / (field.box.scale * slope.median())).float()))


def _grids(spacing: float, sides: NDArray, numbers: SurfaceFit) -> Spline:
    """Cells of two spacings, and three coarser grids."""
    finest = min(numbers.most_cells, max(2**numbers.levels, round(1 / spacing)))
    return Spline(tuple(round(finest / 2**k) for k in reversed(range(numbers.levels))), tuple(sides))


def _samples(
    points: NDArray,
    normals: NDArray,
    k: int,
    sigma: float,
    box: Box,
    corners: tuple[NDArray, NDArray],
    numbers: SurfaceFit,
    random_state: int,
) -> Samples:
    """The points, where the distance is 0, and anchors, where it is that to the planes next to them."""
    planes = local_planes(points, k)[0]
    places, distances, tolerance = _plane_distances(points, planes, normals, sigma, *corners, numbers, random_state)
    return Samples(
        torch.from_numpy(np.concatenate([points, places])),
        torch.from_numpy(np.concatenate([np.zeros(len(points)), distances / box.scale]))[:, None],
        torch.from_numpy(np.concatenate([np.ones(len(points)), (sigma / tolerance) ** 2]))[:, None],
    )


def _plane_distances(
    points: NDArray,
    planes: NDArray,
    normals: NDArray,
    sigma: float,
    low: NDArray,
    high: NDArray,
    numbers: SurfaceFit,
    random_state: int,
) -> tuple[NDArray, NDArray, NDArray]:
    """Places (M, d), half of them near points, and their signed distance (M,) to the surface by the planes next to them."""
    from scipy.spatial import cKDTree  # slow to import

    rng, spacing = np.random.default_rng(random_state), spacing_of(points)
    half, d = max(500, round(numbers.anchors * len(points) / 2)), points.shape[1]
    near = points[rng.integers(len(points), size=half)] + 4 * spacing * rng.standard_normal((half, d))
    places = np.concatenate([near.clip(low, high), low + (high - low) * rng.random((half, d))])
    gap, nearest = cKDTree(planes).query(places, k=min(6, len(points)))
    height = np.median(((places[:, None] - planes[nearest]) * normals[nearest]).sum(-1), 1)
    distance = np.where(np.abs(height) < 3 * spacing, height, np.sign(height) * gap[:, 0])
    a, b, c = numbers.tolerance
    return places, distance, a * spacing + b * sigma + c * np.abs(distance)


def _checked_normals(normals: ArrayLike, points: NDArray) -> NDArray:
    normals = np.asarray(normals, dtype=np.float64)
    if normals.shape != points.shape:
        msg = f"`normals` has shape {normals.shape}: expected that of `points`, {points.shape}"
        raise ValueError(msg)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length[:, 0]) & (length[:, 0] > 0)))
    if len(bad):
        msg = f"`normals` has no direction at {len(bad)} of {len(points)} points (first: row {bad[0]}): drop them, or pass None"
        raise ValueError(msg)
    return normals / length


def _check_surface(points: NDArray, lam: float, bend: float | str, steps: int | str) -> None:
    n, d = points.shape
    if n < LEAST_POINTS:
        msg = f"`points` has {n} rows: a surface needs at least {LEAST_POINTS}"
        raise ValueError(msg)
    size = np.linalg.svd(points - points.mean(0), compute_uv=False)
    if not size[-1] > 1e-6 * size[0]:
        where = (
            "the same"
            if size[0] == 0
            else f"on a line or a plane (singular values {', '.join(f'{s:.3g}' for s in size)})"
        )
        msg = f"all {n} `points` are {where}: they enclose nothing in {d} dimensions"
        raise ValueError(msg)
    if not (isinstance(lam, Real) and 0 < lam < math.inf):
        msg = f"`lam={lam!r}`: expected a positive, finite number of nats; without it f = 0 is the fit"
        raise ValueError(msg)
    if bend != "auto" and not (isinstance(bend, Real) and 0 <= bend < math.inf):
        msg = f"`bend={bend!r}`: expected a finite number >= 0 in box units, or 'auto'"
        raise ValueError(msg)
    if steps != "auto" and not (isinstance(steps, Integral) and steps >= 1):
        msg = f"`steps={steps!r}`: expected a whole number >= 1, or 'auto'"
        raise ValueError(msg)
