"""Surfaces from points: the fit of a signed distance that is zero on the surface."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from neurst.core.arguments import (
    ANYTHING,
    AUTO,
    NONE,
    POSITIVE,
    SIZE,
    check_fields,
    checked,
    coordinates,
    instance,
    number,
    real_array,
    several,
    whole,
)
from neurst.core.field import Field, FittedField, finite_array, positive_number, stored_as
from neurst.core.fit import FIT, FitConfig, OnStep, fit_field
from neurst.core.heads import Affine
from neurst.core.jet import Jet
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Spline
from neurst.core.penalty import Eikonal
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.samples import Box, Samples
from neurst.core.tuning import FULL_SEARCH, LineSearch, choose
from neurst.imaging.options import OPTIONS, FitOptions
from neurst.imaging.surface.mesh import BLOCK, extract_mesh
from neurst.imaging.surface.planes import local_planes, noise_along, patch_size, spacing_of, turned_alike

LEAST_POINTS = 20


@dataclass(frozen=True)
class SurfaceConfig:
    """Numbers of the fit of a surface.

    Parameters
    ----------
    lam_per_point
        Prior strength where the options say ``lam="auto"``, in nats for each point.
    levels, most_cells
        Where the options say ``network="auto"``: number of grids of the spline, each twice as fine as the one before, and largest number of cells
        along a side of the finest grid. If the points are sparse, its cells are two spacings of the points wide.
    neighbours, flat, most_neighbours
        Number of points of a local plane. It is doubled, up to `most_neighbours`, while noise makes the typical patch of points thicker than
        `flat`. Thickness is the variance along the normal as a share of the next larger variance, which lies along the patch.
    anchors
        Number of anchors for each point. Anchors are places off the surface where the distance to the local planes is a soft observation.
    near_anchors, trusted_height
        Half of the anchors are drawn around points with the standard deviation `near_anchors`. Up to `trusted_height`, the distance of an anchor
        is its height above the local planes; beyond, it is the distance to the nearest plane. Both are in spacings of the points.
    tolerance
        Standard deviation of the distance of an anchor: the sum of a multiple of the spacing of the points, a multiple of their noise, and a
        share of the distance.
    fit
        Numbers of the fit.
    network_rate
        Learning rate at the first step where the network is not a spline.
    search
        How `bending_length` is chosen, where the options do not say it; `start` is in spacings of the points here.
    margin
        Width of the margin around the points, as a share of the longest side of their bounding box.
    least_noise
        Smallest noise of the points in box units. Even exact points are not fitted more closely.
    """

    lam_per_point: float = 3.0
    levels: int = 4
    most_cells: int = 128
    neighbours: int = 12
    flat: float = 0.15
    most_neighbours: int = 48
    anchors: float = 2.0
    near_anchors: float = 4.0
    trusted_height: float = 3.0
    tolerance: tuple[float, float, float] = (1.0, 2.0, 0.05)
    fit: FitConfig = FitConfig(steps=300, learning_rate=1e-2, batch_points=4096, n_regularisation=1024, near=0.9)
    network_rate: float = 2e-3
    search: LineSearch = LineSearch(start=2.0, ratio=2.0, max_steps=2, fraction=0.2, steps=150)
    margin: float = 0.05
    least_noise: float = 1e-4

    def __post_init__(self):
        check_fields(self, tolerance=several(number(0), 3), fit=FIT, search=FULL_SEARCH)


@stored_as("surface")
@dataclass(frozen=True, eq=False)
class Surface(Field):
    """A surface as the zero set of a signed distance, which is negative inside and positive outside.

    All lengths are in the units of the points, and normals point outwards.

    Parameters
    ----------
    field
        The signed distance, in the units of the points.
    sigma
        Standard deviation of the points along the normal, in their units.
    points
        (N, d), the points to which the surface was fitted.
    low, high
        (d,) corners of the region of the fit: the bounding box with its margin.
    bending_length
        The length that weighs the bending of the surface, in the units of the points, given or chosen.
    """

    field: FittedField
    sigma: float
    points: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    bending_length: float

    @property
    def box(self) -> Box:
        """The box of the signed distance."""
        return self.field.box

    @property
    def n_channels(self) -> int:
        """1, for the signed distance."""
        return 1

    def in_box(self, x: torch.Tensor | Jet) -> torch.Tensor | Jet:
        return self.field.in_box(x)

    def distance(self, query: ArrayLike) -> NDArray[np.float64]:
        """Signed distance (Q,) at points (Q, d), both in the same unit."""
        return self(coordinates("query", query, (self.n_dims,)))[:, 0]

    def normals(self, query: ArrayLike) -> NDArray[np.float64]:
        """Unit normals (Q, d) of the level sets through points (Q, d). They point outwards."""
        slope = self.jacobian(coordinates("query", query, (self.n_dims,)))[:, 0]
        return slope / np.linalg.norm(slope, axis=1, keepdims=True)

    def project(self, query: ArrayLike, *, n_iter: int = 5) -> NDArray[np.float64]:
        r"""Points (Q, d) moved onto the surface by Newton steps along the normal, :math:`x - f \nabla f / \|\nabla f\|^2`."""
        x = coordinates("query", query, (self.n_dims,))
        for _ in range(SIZE("n_iter", n_iter)):
            slope = self.jacobian(x)[:, 0]
            x = x - (self.distance(x) / np.square(slope).sum(1))[:, None] * slope
        return x

    @checked(
        resolution=whole(BLOCK),
        within=(NONE | AUTO | POSITIVE).advised("a distance in the units of the points; None closes all holes"),
        max_resolution=SIZE,
    )
    def mesh(
        self, resolution: int = 128, *, within: float | str | None = "auto", max_resolution: int = 512
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Triangles of the zero set, by marching cubes :cite:p:`Lewiner2003`.

        Parameters
        ----------
        resolution
            Number of lattice cells along the longest side. The distance is computed only in blocks that the surface may cross, and pieces
            of the zero set that are not near any point are left out.
        within
            Leave out triangles farther than this from every point, in their units, so that holes in the points stay open; None closes
            them. ``"auto"`` finds the holes from the points. In a hole, the nearest point is farther away than this point's twelfth
            neighbour is from it; the places around, which have points on one side only, belong to the hole too. This works for any density
            of the points, also one that varies, and random gaps are not taken for holes.
        max_resolution
            Largest `resolution` allowed. Memory grows with its third power, to about 2 GB at 512.

        Returns
        -------
        Vertices (V, 3) in the units of the points, and faces (F, 3), counter-clockwise seen from outside.
        """
        if self.n_dims != 3:
            msg = f"`mesh` needs a surface in 3 dimensions, this one has {self.n_dims}: read `distance` on a lattice, and trace its zero"
            raise ValueError(msg)
        if resolution > max_resolution:
            msg = f"`resolution={resolution}` is above `max_resolution={max_resolution}`: the lattice would have {resolution**3:.3g} nodes; raise the limit if memory allows"
            raise ValueError(msg)
        return extract_mesh(self.distance, self.low, self.high, self.points, resolution, within)

    def to_dict(self) -> dict[str, Any]:
        numbers = {"sigma": self.sigma, "bending_length": self.bending_length}
        return {"distance": self.field.to_dict(), "points": self.points, "low": self.low, "high": self.high, **numbers}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Surface:
        field = FittedField.from_dict(stored["distance"])
        d = field.n_dims
        points = finite_array(stored, "points", len(stored["points"]), d, dtype=np.float64)
        low, high = (finite_array(stored, name, d, dtype=np.float64) for name in ("low", "high"))
        return cls(field, positive_number(stored, "sigma"), points, low, high, float(stored["bending_length"]))


@checked(
    points=ANYTHING,
    normals=ANYTHING,
    sigma=(NONE | POSITIVE).advised("in the units of `points`"),
    bending_length=(AUTO | number(0)).advised("in the units of `points`"),
    options=OPTIONS,
    config=instance(SurfaceConfig, "a `neurst.imaging.SurfaceConfig`"),
)
def fit_surface(
    points: ArrayLike,
    normals: ArrayLike | None = None,
    *,
    sigma: float | None = None,
    bending_length: float | str = "auto",
    options: FitOptions = FitOptions(),
    config: SurfaceConfig = SurfaceConfig(),
) -> Surface:
    r"""Fit a surface to noisy points, as the zero set of a signed distance f.

    Minimises :math:`\sum_i \tfrac12 (f(x_i) / \sigma)^2 + \lambda\,\mathrm{mean}_x \big[(\|\nabla f\| - 1)^2 + (b \|\nabla^2 f\|_F)^2\big]`, in units of
    the box (half the longest side of the bounding box of the points is 1). The eikonal equation makes f a distance :cite:p:`Gropp2020`. The
    Hessian is the derivative of the normals, so b weighs the bending energy of the surface. Distances to local planes are used as soft
    observations off the surface, which determine the outside. The noise of the points makes f too flat, so f is divided by its typical slope
    at the end.

    Parameters
    ----------
    points
        (N, d), d = 2 or 3, with one unit of length for all axes.
    normals
        (N, d) vectors of any length that point outwards; they only determine the outside. None estimates them from planes through the
        nearest points. Neighbouring normals are made to agree along a minimum spanning tree :cite:p:`Hoppe1992`, and turned so that most
        points that are visible from outside face outwards.
    sigma
        Standard deviation of the noise, in the units of the data; None estimates it. It is that of the points along the normal, and is
        estimated from the planes through the nearest points.
    bending_length
        b, a length in the units of the points; a larger value gives a smoother surface. ``"auto"`` takes the value for which the surface is
        nearest to held-out points.
    options
        Choices that every fit offers, such as `lam` and ``progress``. Here ``lam="auto"`` is 3 nats for each point, and ``lam`` must be positive.
        The penalty is always :class:`neurst.core.penalty.Eikonal`. ``search`` is used to choose `bending_length`.
    config
        Numbers of the method.

    Returns
    -------
    Surface
        The surface, with the methods ``distance``, ``normals``, ``project``, ``mesh`` and ``save``.

    Raises
    ------
    TypeError, ValueError
        If there are fewer than 20 points, they lie on a line or in a plane, or `options` asks for another penalty or for no prior.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, fit_surface
    >>> angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    >>> circle = 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
    >>> surface = fit_surface(circle, bending_length=0.5, options=FitOptions(steps=50, progress=False))
    >>> surface.distance([[0.0, 0.0], [4.0, 0.0]]).shape
    (2,)
    """
    AUTO.advised("the penalty of a surface is always `Eikonal`")("options.penalty", options.penalty)
    (AUTO | POSITIVE).advised("without a prior, f = 0 is the best fit")("options.lam", options.lam)
    points = coordinates("points", points, least=LEAST_POINTS)
    _check_spread(points)
    k = patch_size(points, config.neighbours, config.flat, config.most_neighbours)
    planes, frame, spread = local_planes(points, k)
    normals = turned_alike(points, frame, config.neighbours) if normals is None else _checked_normals(normals, points)
    sigma = noise_along(spread, k, points.shape[1]) if sigma is None else sigma
    low, high = points.min(0), points.max(0)
    room = config.margin * (high - low).max()
    low, high = low - room, high + room
    box = Box.of(torch.from_numpy(np.stack([low, high])))
    sigma = max(float(sigma), config.least_noise * box.scale)
    spacing = spacing_of(points) / box.scale
    network = options.network_or(_grids(spacing, (high - low) / (high - low).max(), config))
    lam_per_point = config.lam_per_point if options.lam == "auto" else options.lam / len(points)
    rate = config.fit.learning_rate if isinstance(network, Spline) else config.network_rate
    fit_config = options.fit_config(dataclasses.replace(config.fit, learning_rate=rate))

    def fit(rows: NDArray, middles: NDArray, length: float, numbers: FitConfig, on_step: OnStep) -> Surface:
        shown = points[rows]
        places, distances, tolerance = _anchors(shown, middles, normals[rows], sigma, low, high, config, options)
        samples = Samples(
            torch.from_numpy(np.concatenate([shown, places])),
            torch.from_numpy(np.concatenate([np.zeros(len(shown)), distances / box.scale]))[:, None],
            torch.from_numpy(np.concatenate([np.ones(len(shown)), (sigma / tolerance) ** 2]))[:, None],
        )
        found = fit_field(
            samples,
            network=network,
            likelihood=Gaussian(sigma / box.scale),
            penalty=Eikonal(length / box.scale),
            lam=lam_per_point * len(rows),
            box=box,
            region=torch.from_numpy(shown),
            config=numbers,
            on_step=on_step,
        )
        return Surface(_steepened(found, shown, frame[rows]), sigma, shown, low, high, length)

    with progress_bar(options.progress) as on_progress:
        counter = StepCounter(on_progress)
        if bending_length == "auto":
            start, steps = config.search.start * spacing * box.scale, min(fit_config.steps, config.search.steps)
            search = options.search.with_defaults(dataclasses.replace(config.search, start=start, steps=steps))
            hidden, shown = search.hold_out(len(points), options.random_state)
            short, middles = dataclasses.replace(fit_config, steps=search.steps), local_planes(points[shown], k)[0]

            def trial(length: float) -> tuple[float, None]:
                on_step = counter.stage(f"choosing bending_length: {length:.2g}", short.steps)
                found = fit(shown, middles, length, short, on_step)
                return -float(np.abs(found.distance(points[hidden])).mean() / sigma), None

            bending_length = choose(trial, search, name="bending_length").strength
        rows = np.arange(len(points))
        return fit(rows, planes, bending_length, fit_config, counter.stage("fitting", fit_config.steps))


def _steepened(field: FittedField, points: NDArray, frame: NDArray) -> FittedField:
    """The field divided by its typical slope along the normals of the planes, which noisy positions make too small."""
    slope = (field.jacobian(points)[:, 0] * frame).sum(1)
    scale = torch.tensor(1 / np.median(np.abs(slope)), dtype=torch.float64)
    return field.with_head(Affine(torch.zeros((), dtype=torch.float64), scale))


def _grids(spacing: float, sides: NDArray, config: SurfaceConfig) -> Spline:
    """A spline whose finest cells are two spacings of the points wide, with coarser grids. The spacing is in box units."""
    finest = min(config.most_cells, max(2**config.levels, round(1 / spacing)))
    return Spline(tuple(round(finest / 2**k) for k in reversed(range(config.levels))), tuple(sides))


def _anchors(
    points: NDArray,
    planes: NDArray,
    normals: NDArray,
    sigma: float,
    low: NDArray,
    high: NDArray,
    config: SurfaceConfig,
    options: FitOptions,
) -> tuple[NDArray, NDArray, NDArray]:
    """Places (M, d), half of them near points, their signed distance (M,) to nearby planes, and its standard deviation (M,)."""
    from scipy.spatial import cKDTree  # slow to import

    rng, spacing = np.random.default_rng(options.random_state), spacing_of(points)
    half, d = max(500, round(config.anchors * len(points) / 2)), points.shape[1]
    jitter = config.near_anchors * spacing * rng.standard_normal((half, d))
    near = points[rng.integers(len(points), size=half)] + jitter
    places = np.concatenate([near.clip(low, high), low + (high - low) * rng.random((half, d))])
    gap, nearest = cKDTree(planes).query(places, k=min(6, len(points)))
    height = np.median(((places[:, None] - planes[nearest]) * normals[nearest]).sum(-1), 1)
    distance = np.where(np.abs(height) < config.trusted_height * spacing, height, np.sign(height) * gap[:, 0])
    a, b, c = config.tolerance
    return places, distance, a * spacing + b * sigma + c * np.abs(distance)


def _checked_normals(normals: ArrayLike, points: NDArray) -> NDArray:
    normals = real_array("normals", normals)
    if normals.shape != points.shape:
        msg = f"`normals` has shape {normals.shape}: expected that of `points`, {points.shape}"
        raise ValueError(msg)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length[:, 0]) & (length[:, 0] > 0)))
    if len(bad):
        msg = f"`normals` has no direction at {len(bad)} of {len(points)} points (first: row {bad[0]}): drop them, or pass None"
        raise ValueError(msg)
    return normals / length


def _check_spread(points: NDArray) -> None:
    """Raise an error if all points are at one place, on a line or on a plane."""
    n, d = points.shape
    size = np.linalg.svd(points - points.mean(0), compute_uv=False)
    if not size[-1] > 1e-6 * size[0]:
        where = f"on a line or a plane (singular values {', '.join(f'{s:.3g}' for s in size)})"
        msg = f"all {n} `points` are {'the same' if size[0] == 0 else where}: they enclose nothing in {d} dimensions"
        raise ValueError(msg)
