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

from neurst.core.fit import Field, FitConfig, fit_field
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Network, Siren, as_network
from neurst.core.penalty import Eikonal
from neurst.core.samples import Box, Samples
from neurst.imaging.points import READ_AT_ONCE, checked_points, progress_stages

BLOCK = 8  # lattice cells along a side of what is read, or passed over, as one
REACH = 2.0  # a block is read if its middle is this many half diagonals from the surface, or nearer
N_VIEWS = 200  # directions that a piece is looked at from
LEAST_SHARE = 0.1  # of a piece of a mesh that is near points
HOLE = 12  # neighbours that tell a hole from a gap between points
ONE_SIDED = 0.55  # mean offset of so many points in units of the farthest of them, from which on they lie on one side
LEAST_POINTS = 20
LEAST_NOISE = 1e-4  # in box units: exact points are not fitted closer


@dataclass(frozen=True)
class SurfaceFit:
    """Numbers of a surface fit.

    Parameters
    ----------
    network
        Where ``network="auto"``, for dense points.
    fineness
        Radians per spacing of the points: where they are sparse, `omega` of that network is this over the spacing.
    stiffness
        Spacings that ``bend="auto"`` is at least.
    bend
        And what it is for dense points, in box units.
    neighbours
        Points of a local plane.
    start_steps, steps
        Adam steps without the prior, which tell inside from outside, and of the fit itself.
    anchors
        Places off the surface, per point, where the distance to the local planes is a soft observation.
    tolerance
        Its standard deviation: so many spacings of the points, and that share of the distance.
    learning_rate
        At the first step of each.
    batch_points, n_regularisation
        Points and regularisation points drawn for one step.
    near, jitter
        Share of the regularisation points near the points, and their standard deviation in spacings; the rest covers the box.
    margin
        Room left around the points, as a share of the longest side of their bounding box.
    """

    network: Siren = Siren(width=128, depth=3, omega=24.0)
    fineness: float = 0.42
    stiffness: float = 0.115
    bend: float = 2e-3
    neighbours: int = 12
    start_steps: int = 250
    steps: int = 1200
    anchors: float = 2.0
    tolerance: tuple[float, float] = (1.0, 0.05)
    learning_rate: float = 2e-3
    batch_points: int = 1536
    n_regularisation: int = 512
    near: float = 0.8
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
    """

    field: Field
    sigma: float
    points: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def _read(self, read: Callable[[torch.Tensor], torch.Tensor], query: ArrayLike) -> NDArray[np.float64]:
        query = torch.from_numpy(checked_points("query", query, len(self.low)))
        return torch.cat([read(part).double() for part in query.split(READ_AT_ONCE)]).numpy()

    def distance(self, query: ArrayLike) -> NDArray[np.float64]:
        """Signed distance (Q,) at points (Q, d), both in the same unit."""
        return self.field.box.scale * self._read(self.field, query)[:, 0]

    def normals(self, query: ArrayLike) -> NDArray[np.float64]:
        """Unit normals (Q, d) of the level set through each point (Q, d), outwards."""
        slope = self._read(self.field.latent_jacobian, query)[:, 0]
        return slope / np.linalg.norm(slope, axis=1, keepdims=True)

    def project(self, query: ArrayLike, *, n_iter: int = 5) -> NDArray[np.float64]:
        r"""Points (Q, d) moved onto the surface by Newton's steps along the normal, :math:`x - f \nabla f / \|\nabla f\|^2`."""
        x = checked_points("query", query, len(self.low))
        for _ in range(n_iter):
            slope = self.field.box.scale * self._read(self.field.latent_jacobian, x)[:, 0]
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
        from scipy.spatial import cKDTree  # slow to import
        from skimage.measure import marching_cubes  # slow to import

        if len(self.low) != 3:
            msg = f"`mesh` needs a surface in 3 dimensions, this one has {len(self.low)}: read `distance` on a lattice, and trace its zero"
            raise ValueError(msg)
        if not (isinstance(resolution, Integral) and resolution >= BLOCK):
            msg = f"`resolution={resolution!r}`: expected a whole number >= {BLOCK}"
            raise ValueError(msg)
        if not (within is None or within == "auto" or (isinstance(within, Real) and 0 < within < math.inf)):
            msg = f"`within={within!r}`: expected a positive distance in the units of the points, 'auto', or None to close all holes"
            raise ValueError(msg)
        step = (self.high - self.low).max() / resolution
        blocks = np.ceil((self.high - self.low) / (step * BLOCK)).astype(int)
        corner = step * BLOCK * np.stack(np.meshgrid(*map(np.arange, blocks), indexing="ij"), -1).reshape(-1, 3)
        middle = self.distance(self.low + corner + step * BLOCK / 2)
        lattice = np.repeat(middle, BLOCK**3).reshape(-1, BLOCK, BLOCK, BLOCK)
        inner = step * np.stack(np.meshgrid(*[np.arange(BLOCK)] * 3, indexing="ij"), -1).reshape(-1, 3)
        close = np.flatnonzero(np.abs(middle) < REACH * math.sqrt(3) / 2 * step * (BLOCK + 1))
        for part in np.array_split(close, len(close) // 64 + 1):
            query = (self.low + corner[part])[:, None] + inner
            lattice[part] = self.distance(query.reshape(-1, 3)).reshape(-1, BLOCK, BLOCK, BLOCK)
        lattice = lattice.reshape(*blocks, BLOCK, BLOCK, BLOCK).transpose(0, 3, 1, 4, 2, 5).reshape(*(blocks * BLOCK))
        if not lattice.min() < 0 < lattice.max():
            msg = f"the distance has no zero in its box ({lattice.min():.3g} to {lattice.max():.3g}): the fit has failed; give `normals`"
            raise ValueError(msg)
        vertices, faces, _, _ = marching_cubes(lattice, 0.0, gradient_direction="descent")
        vertices = self.low + step * vertices.astype(np.float64)
        vertices, faces = _supported(vertices, faces.astype(np.int64), self.points, step)
        if within is None:
            return vertices, faces
        if within == "auto":
            open_ = _holes(vertices, faces, self.points)
        else:
            open_ = cKDTree(self.points).query(vertices)[0] > within
        faces = faces[~open_[faces].all(1)]
        used = np.unique(faces)
        return vertices[used], np.searchsorted(used, faces)


def _holes(vertices: NDArray, faces: NDArray, points: NDArray) -> NDArray:  # -> (V,) bool
    r"""Vertices in holes of the points, with k = 12.

    The core of a hole is farther from the nearest point than this one from its k-th neighbour; of places that points cover at random
    ``exp(-k)`` are. Its rim is what hangs together with the core and has its points on one side: the mean of its k nearest is 0.55 or more of
    the distance to the k-th away. On the edge of a half plane that is 0.42 :math:`= 4 / (3 \pi)`, and more beyond.
    """
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import connected_components  # slow to import
    from scipy.spatial import cKDTree  # slow to import

    k, tree = min(HOLE, len(points) - 1), cKDTree(points)
    gap, near = tree.query(vertices, k=k)
    core = gap[:, 0] > tree.query(points, k=[k + 1])[0][near[:, 0], 0]
    rim = core | (np.linalg.norm(points[near].mean(1) - vertices, axis=1) > ONE_SIDED * gap[:, -1])
    a, b = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).T
    both = rim[a] & rim[b]
    graph = coo_matrix((np.ones(both.sum()), (a[both], b[both])), shape=(len(vertices),) * 2)
    n_places, place = connected_components(graph, directed=False)
    return (np.bincount(place, core, n_places) > 0)[place]


def _supported(vertices: NDArray, faces: NDArray, points: NDArray, step: float) -> tuple[NDArray, NDArray]:
    """The connected pieces of a mesh of which a tenth or more is near points: within 3 spacings, or a step of the lattice."""
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import connected_components  # slow to import
    from scipy.spatial import cKDTree  # slow to import

    edges = faces[:, [0, 1, 1, 2]].reshape(-1, 2).T
    graph = coo_matrix((np.ones(edges.shape[1]), edges), shape=(len(vertices),) * 2)
    n_pieces, piece = connected_components(graph, directed=False)
    tree = cKDTree(points)
    reach = max(3 * float(np.median(tree.query(points, k=2)[0][:, 1])), step)
    close = tree.query(vertices)[0] < reach
    share = np.bincount(piece, close, n_pieces) / np.bincount(piece, minlength=n_pieces)
    keep = share[piece] >= LEAST_SHARE
    return vertices[keep], (np.cumsum(keep) - 1)[faces[keep[faces[:, 0]]]]


def fit_surface(
    points: ArrayLike,
    normals: ArrayLike | None = None,
    *,
    sigma: float | None = None,
    lam: float = 3e4,
    bend: float | str = "auto",
    network: str | Network = "auto",
    steps: int | str = "auto",
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Surface:
    r"""A surface from noisy points, as the zero of a signed distance f.

    Minimises :math:`\sum_i \tfrac12 (f(x_i) / \sigma)^2 + \lambda\,\mathrm{mean}_x (\|\nabla f\| - 1)^2 + b \|\nabla^2 f\|_F`, in units of the
    box (half the longest side of the points' bounding box is 1): the eikonal equation makes f a distance :cite:p:`Gropp2020`, and the
    Hessian is the derivative of the normals, whose total variation is small on flat pieces that meet in creases. It goes on from a
    field of the distances to local planes, which says which side is outside.

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
        Prior strength in nats, > 0.
    bend
        b, a length in box units: larger is smoother. ``"auto"`` follows the spacing of the points.
    network
        A name of :data:`neurst.core.nets.NETWORKS`, a network, or ``"auto"``: a sine network as fine as the points are dense.
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
    planes, frame, spread = _local_planes(points, numbers.neighbours)
    normals = _turned_alike(points, frame, numbers.neighbours) if normals is None else _checked_normals(normals, points)
    if sigma is None:
        sigma = _noise_along(spread, numbers.neighbours, points.shape[1])
    elif not (isinstance(sigma, Real) and 0 < sigma < math.inf):
        msg = f"`sigma={sigma!r}`: expected a positive number in the units of `points`"
        raise ValueError(msg)
    low, high = points.min(0), points.max(0)
    room = numbers.margin * (high - low).max()
    low, high = low - room, high + room
    box = Box.of(torch.from_numpy(np.stack([low, high])))
    sigma = max(float(sigma), LEAST_NOISE * box.scale)
    spacing = _spacing(points) / box.scale
    omega = min(numbers.network.omega, numbers.fineness / spacing)
    network = dataclasses.replace(numbers.network, omega=omega) if network == "auto" else as_network(network)
    bend = max(numbers.bend, numbers.stiffness * spacing) if bend == "auto" else bend
    config = FitConfig(
        steps=numbers.steps if steps == "auto" else steps,
        learning_rate=numbers.learning_rate,
        batch_points=numbers.batch_points,
        n_regularisation=numbers.n_regularisation,
        near=numbers.near,
        jitter=numbers.jitter,
        random_state=random_state,
        device=device,
    )
    places, distances, tolerance = _plane_distances(points, planes, normals, low, high, numbers, random_state)
    samples = Samples(
        torch.from_numpy(np.concatenate([points, places])),
        torch.from_numpy(np.concatenate([np.zeros(len(points)), distances / box.scale]))[:, None],
        torch.from_numpy(np.concatenate([np.ones(len(points)), (sigma / tolerance) ** 2]))[:, None],
    )
    begin = dataclasses.replace(config, steps=min(numbers.start_steps, config.steps))
    parts = {
        "network": network,
        "likelihood": Gaussian(sigma / box.scale),
        "penalty": Eikonal(bend),
        "box": box,
        "region": torch.from_numpy(points),
    }
    with progress_stages(progress) as stage:
        start = fit_field(samples, lam=0.0, config=begin, on_step=stage("start", begin.steps), **parts)
        field = fit_field(samples, lam=lam, config=config, start=start, on_step=stage("surface", config.steps), **parts)
    return Surface(field, sigma, points, low, high)


def _spacing(points: NDArray) -> float:
    """Median distance to the nearest other point."""
    from scipy.spatial import cKDTree  # slow to import

    return max(float(np.median(cKDTree(points).query(points, k=2)[0][:, 1])), np.finfo(float).tiny)


def _local_planes(points: NDArray, k: int) -> tuple[NDArray, NDArray, NDArray]:
    """Mean (N, d) of the `k` nearest points of each, normal (N, d) of the plane through them, and variances (N, d), ascending."""
    from scipy.spatial import cKDTree  # slow to import

    k = min(k, len(points))
    near = points[cKDTree(points).query(points, k=k)[1]].reshape(len(points), k, -1)
    middle = near.mean(1)
    offset = near - middle[:, None]
    variance, frame = np.linalg.eigh(np.einsum("nki,nkj->nij", offset, offset) / k)
    return middle, frame[:, :, 0], variance.clip(0)


def _noise_along(variance: NDArray, k: int, d: int) -> float:
    """Noise along the normal: the median over planes of d parameters."""
    return float(np.sqrt(np.median(variance[:, 0]) * k / (k - d)))


def _turned_alike(points: NDArray, normals: NDArray, k: int) -> NDArray:
    """Normals turned outwards: neighbours agree along the minimum spanning tree of ``1 - |n_i . n_j|``, and most of what is seen from outside faces it."""
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree  # slow to import
    from scipy.spatial import cKDTree  # slow to import

    distance, near = cKDTree(points).query(points, k=min(k, len(points)))
    row, column = np.repeat(np.arange(len(points)), near.shape[1] - 1), near[:, 1:].ravel()
    # a little for the distance: of equal angles the nearer neighbour; never 0, which would be no edge
    far = distance[:, 1:].ravel() / max(distance[:, 1:].mean(), np.finfo(float).tiny)
    cost = 1 - np.abs((normals[row] * normals[column]).sum(1)) + 1e-3 * far + 1e-9
    graph = coo_matrix((cost, (row, column)), shape=(len(points),) * 2).tocsr()
    tree = minimum_spanning_tree(graph.maximum(graph.T))
    out = normals.copy()
    views = np.random.default_rng(0).standard_normal((N_VIEWS, points.shape[1]))
    _, piece = connected_components(tree, directed=False)
    for part in range(piece.max() + 1):
        members = np.flatnonzero(piece == part)
        order, parent = breadth_first_order(tree, members[0], directed=False)
        for i in order[1:]:
            if out[i] @ out[parent[i]] < 0:
                out[i] *= -1
        # the point farthest in a direction is seen from there: most of these must face it
        seen = members[(points[members] @ views.T).argmax(0)]
        if np.sign((out[seen] * views).sum(1)).sum() < 0:
            out[members] *= -1
    return out


def _plane_distances(
    points: NDArray,
    planes: NDArray,
    normals: NDArray,
    low: NDArray,
    high: NDArray,
    numbers: SurfaceFit,
    random_state: int,
) -> tuple[NDArray, NDArray, NDArray]:
    """Places (M, d), half of them near points, and their signed distance (M,) to the surface by the planes next to them."""
    from scipy.spatial import cKDTree  # slow to import

    rng, spacing = np.random.default_rng(random_state), _spacing(points)
    half, d = max(500, round(numbers.anchors * len(points) / 2)), points.shape[1]
    near = points[rng.integers(len(points), size=half)] + 4 * spacing * rng.standard_normal((half, d))
    places = np.concatenate([near.clip(low, high), low + (high - low) * rng.random((half, d))])
    gap, nearest = cKDTree(planes).query(places, k=min(6, len(points)))
    height = np.median(((places[:, None] - planes[nearest]) * normals[nearest]).sum(-1), 1)
    distance = np.where(np.abs(height) < 3 * spacing, height, np.sign(height) * gap[:, 0])
    return places, distance, numbers.tolerance[0] * spacing + numbers.tolerance[1] * np.abs(distance)


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
