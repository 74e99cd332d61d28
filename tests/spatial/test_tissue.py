from itertools import product
from math import prod

import numpy as np
import pytest
from real import needs_data, read
from scipy.spatial.distance import cdist

from neurst.spatial import tissue
from neurst.spatial.tissue import disc_quadrature, distance_to_spots, distinct, geometry, query_lattice

VECTORS = {"hexagonal": np.array([[1.0, 0.0], [0.5, np.sqrt(3) / 2]]), "square": np.eye(2)}
LATTICES = [(kind, angle, scale) for kind in VECTORS for angle in (0.0, 0.2, 0.5, 1.3, 2.9) for scale in (1e-3, 137.0)]


def rotation(angle):
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def lattice(kind, *, n=12, angle=0.0, scale=1.0, jitter=0.0, seed=0, shift=(3.7, -41.2)):
    """About n x n points of a lattice in a square window without one corner, and its exact vectors."""
    index = np.stack(np.meshgrid(np.arange(-2 * n, 2 * n), np.arange(-2 * n, 2 * n)), axis=-1).reshape(-1, 2)
    points = index @ VECTORS[kind]
    points = points[(np.abs(points) <= n / 2).all(1) & (points.sum(1) < 0.7 * n)]
    noise = jitter * np.random.default_rng(seed).normal(size=points.shape)
    return ((points + noise) @ rotation(angle) + shift) * scale, VECTORS[kind] @ rotation(angle) * scale


def uniform(n=300, d=2, seed=0):
    return np.random.default_rng(seed).random((n, d)) * 100


def spaced(n=4000, seed=0):
    """Random positions no closer than 2 units: even distances, no directions."""
    points = []
    for p in uniform(n, seed=seed) / 2:
        if not points or np.min(np.linalg.norm(np.array(points) - p, axis=1)) > 2:
            points.append(p)
    return np.array(points)


def uneven_grid(seed=0):
    """The directions of a square lattice, uneven distances."""
    x, y = np.cumsum(np.random.default_rng(seed).uniform(0.5, 2.0, (2, 12)), axis=1)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def off_lattice(points, layout):
    """Distance of each point to the lattice of a geometry, in pitches."""
    index = (points - layout.origin) @ np.linalg.inv(layout.basis)
    return np.linalg.norm((index - np.rint(index)) @ layout.basis, axis=1) / layout.pitch


def same_lattice(a, b, atol):
    change = a @ np.linalg.inv(b)
    return np.allclose(change, np.rint(change), atol=atol) and np.isclose(abs(np.linalg.det(change)), 1, atol=atol)


@pytest.mark.parametrize(("kind", "angle", "scale"), LATTICES)
@pytest.mark.parametrize("jitter", [0.0, 0.04])
def test_a_lattice_is_found_whatever_its_orientation_scale_and_place(kind, angle, scale, jitter):
    points, basis = lattice(kind, angle=angle, scale=scale, jitter=jitter)
    layout = geometry(points)
    assert layout.kind == kind
    assert same_lattice(layout.basis, basis, atol=0.02 if jitter else 1e-8)
    assert off_lattice(points, layout).max() < (0.2 if jitter else 1e-8)
    assert layout.pitch == pytest.approx(scale, rel=2e-3)  # the lattice constant, which jitter does not shorten
    assert layout.support_radius == pytest.approx(1.05 * layout.pitch)


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("jitter", [0.03, 0.07])
def test_a_wide_jittered_lattice_does_not_drift(kind, jitter):
    points, _ = lattice(kind, n=80, angle=0.3, scale=137.0, jitter=jitter)
    exact, _ = lattice(kind, n=80, angle=0.3, scale=137.0)
    assert off_lattice(exact, geometry(points)).max() < 0.02


@pytest.mark.parametrize(("kind", "share"), [("hexagonal", 0.3), ("square", 0.5)])
def test_a_random_subset_of_a_lattice_is_that_lattice(kind, share):
    points, basis = lattice(kind, n=60, angle=0.3)
    kept = np.random.default_rng(0).random(len(points)) < share
    layout = geometry(points[kept])
    assert layout.kind == kind
    assert same_lattice(layout.basis, basis, atol=1e-6)


IRREGULAR = {
    "random": uniform(),
    "random, evenly spaced": spaced(),
    "random in space": uniform(d=3),
    "rectangular": np.stack(np.meshgrid(np.arange(9) * 1.6, np.arange(8.0)), axis=-1).reshape(-1, 2),
    "an uneven grid": uneven_grid(),
    "a diagonal line": np.outer(np.arange(20), [1.0, 1.0]),
    "cubic": np.stack(np.meshgrid(*[np.arange(4.0)] * 3), axis=-1).reshape(-1, 3),
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_other_positions_are_irregular(name):
    points = IRREGULAR[name]
    layout = geometry(points)
    near = np.sort(cdist(points, points), axis=1)
    assert layout.kind == "irregular"
    assert layout.pitch == pytest.approx(np.median(near[:, 1]))
    assert layout.support_radius == pytest.approx(np.percentile(near[:, 3], 99))
    np.testing.assert_allclose(layout.basis, layout.pitch * np.eye(points.shape[1]))
    np.testing.assert_array_equal(layout.origin, points.min(0))


@pytest.mark.parametrize("points", [lattice("hexagonal")[0], lattice("square", jitter=0.05)[0], uniform()])
def test_geometry_follows_scaling_rotation_and_translation(points):
    layout, turn = geometry(points), rotation(0.7)
    moved = geometry(points @ turn * 50.0 + [1e4, -3e3])
    assert moved.kind == layout.kind
    assert moved.pitch == pytest.approx(50 * layout.pitch)
    assert moved.support_radius == pytest.approx(50 * layout.support_radius)
    if layout.kind != "irregular":
        assert same_lattice(moved.basis, layout.basis @ turn * 50, atol=1e-6)
        assert off_lattice((layout.origin @ turn * 50 + [1e4, -3e3])[None], moved).max() < 1e-6


@pytest.mark.parametrize("points", [lattice("hexagonal")[0], uniform(), uniform(d=3)])
def test_order_and_duplicates_of_positions_change_nothing(points):
    rng = np.random.default_rng(1)
    again = rng.permutation(np.concatenate([points, points, points[:9]]))
    np.testing.assert_array_equal(distinct(again), distinct(points))
    for name, value in vars(geometry(points)).items():
        np.testing.assert_array_equal(getattr(geometry(again), name), value)
    spacing = geometry(points).pitch
    np.testing.assert_array_equal(query_lattice(again, spacing=spacing), query_lattice(points, spacing=spacing))


def test_one_missing_spot_is_filled_and_the_middle_of_a_larger_hole_is_not():
    points, _ = lattice("hexagonal")
    from_middle = cdist(points, points[[len(points) // 2]])[:, 0]
    middle, layout = points[[len(points) // 2]], geometry(points)
    for hole, filled in {0.1: True, 1.1: False}.items():
        left = points[from_middle > hole]
        query = query_lattice(left, spacing=layout.pitch, geometry=layout)
        assert (distance_to_spots(middle, query)[0] < 1e-6) == filled


QUERIES = {  # positions, lattice, its vectors for spacing 1, relative to the origin of the geometry
    "auto on hexagonal": (lattice("hexagonal", angle=0.4)[0], "auto", None),
    "auto on square": (lattice("square", angle=0.4)[0], "auto", None),
    "auto on irregular": (uniform(80), "auto", np.eye(2)),
    "auto in space": (uniform(40, 3), "auto", np.eye(3)),
    "cubic": (uniform(40, 3), "cubic", np.eye(3)),
    "hexagonal on hexagonal": (lattice("hexagonal", angle=0.4)[0], "hexagonal", None),
    "hexagonal on square": (lattice("square", angle=0.4)[0], "hexagonal", VECTORS["hexagonal"]),
    "hexagonal on irregular": (uniform(80), "hexagonal", VECTORS["hexagonal"]),
    "square on hexagonal": (lattice("hexagonal", angle=0.4)[0], "square", np.eye(2)),
}


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize(("step", "radius"), [(1.0, None), (0.37, None), (0.8, 2.3), (2.1, 0.9)])
def test_query_lattice_is_every_lattice_point_within_the_radius(name, step, radius):
    points, kind, unit = QUERIES[name]
    layout = geometry(points)
    unit = layout.basis / layout.pitch if unit is None else unit
    spacing, radius = step * layout.pitch, layout.support_radius if radius is None else radius * layout.pitch
    n = int(2 * np.ptp(points, axis=0).max() / spacing) + 9
    index = np.stack(np.meshgrid(*[np.arange(-n, n)] * len(unit), indexing="ij"), -1).reshape(-1, len(unit))
    if len(index) > 500_000:  # the brute force in space looks at the box of the tissue only
        at = (points - layout.origin) @ np.linalg.inv(unit * spacing)
        index = index[((index > at.min(0) - 9) & (index < at.max(0) + 9)).all(1)]
    every = layout.origin + index @ (unit * spacing)
    query = query_lattice(points, spacing=spacing, lattice=kind, radius=radius)
    np.testing.assert_allclose(query, every[distance_to_spots(every, points) <= radius], atol=1e-9 * layout.pitch)


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_spot_is_a_query_point_when_the_spacing_divides_the_pitch(kind, n):
    points, _ = lattice(kind, angle=1.1, scale=137.0)
    spacing = geometry(points).pitch / n
    query = query_lattice(points, spacing=spacing)
    assert distance_to_spots(points, query).max() < 1e-6 * spacing
    assert np.median(np.sort(cdist(query[:500], query[:500]), axis=1)[:, 1]) == pytest.approx(spacing)


def test_distance_to_spots_is_the_smallest_distance():
    query, points = uniform(30, seed=1), uniform(50)
    np.testing.assert_allclose(distance_to_spots(query, points), cdist(query, points).min(1))


ERRORS = [
    (2, {"spacing": 0.0}, "`spacing` is 0.0: give a positive, finite length"),
    (2, {"spacing": -1.0}, "`spacing` is -1.0"),
    (2, {"spacing": np.nan}, "`spacing` is nan"),
    (2, {"spacing": 1.0, "radius": np.inf}, "`radius` is inf"),
    (2, {"spacing": 1.0, "lattice": "hex"}, "`lattice` is 'hex': in 2-d choose one of 'auto', 'hexagonal', 'square'"),
    (2, {"spacing": 1.0, "lattice": "cubic"}, "`lattice` is 'cubic': in 2-d"),
    (3, {"spacing": 1.0, "lattice": "hexagonal"}, "`lattice` is 'hexagonal': in 3-d choose one of 'auto', 'cubic'"),
    (3, {"spacing": 1.0, "lattice": "square"}, "`lattice` is 'square': in 3-d"),
    (2, {"spacing": 1e-7}, "`spacing` is 1e-07, too fine: the lattice would have more than 20,000,000 points"),
    (2, {"spacing": 1e-300}, "`spacing` is 1e-300, too fine"),
]


@pytest.mark.parametrize(("d", "arguments", "message"), ERRORS)
def test_a_query_lattice_that_cannot_be_is_refused(d, arguments, message):
    with pytest.raises(ValueError, match=message):
        query_lattice(uniform(50, d), **arguments)


def test_positions_too_far_apart_for_the_spacing_are_refused():
    far = np.concatenate([uniform(50, 3), [[1e12, 1e12, 1e12]]])
    with pytest.raises(ValueError, match="too far apart to be numbered"):
        query_lattice(far, spacing=1.0)


@pytest.mark.parametrize("points", [uniform(1), uniform(40), uniform(40, 3), lattice("hexagonal")[0]])
def test_the_spacing_that_an_error_suggests_fits(points, monkeypatch):
    monkeypatch.setattr(tissue, "MAX_POINTS", 5000)
    spacing, layout = 0.001, geometry(uniform(40, points.shape[1]))
    with pytest.raises(ValueError, match="too fine") as error:
        query_lattice(points, spacing=spacing, radius=2.0, geometry=layout)
    suggested = float(str(error.value).split("Use ")[1].split()[0])
    assert 2000 < len(query_lattice(points, spacing=suggested, radius=2.0, geometry=layout)) <= 5000


def test_a_lattice_without_a_point_near_the_spots_is_empty():
    points, _ = lattice("square")
    layout = geometry(points)
    assert query_lattice(points[:1] + 0.4, spacing=1.0, radius=0.1, geometry=layout).shape == (0, 2)


def ball_moment(powers, radius):
    """Mean of a monomial over a ball: 0 if a power is odd."""
    d, degree = len(powers), sum(powers)
    if any(p % 2 for p in powers):
        return 0.0
    odd = [prod(range(p - 1, 0, -2)) for p in powers]  # (p - 1)!!, the moments of a standard normal
    on_sphere = prod(odd) / prod(d + 2 * k for k in range(degree // 2))
    return on_sphere * d / (d + degree) * radius**degree


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("diameter", [1.0, 55.0])
def test_the_quadrature_of_a_spot_is_exact_up_to_degree_3(d, diameter):
    points = disc_quadrature(diameter, d)
    assert points.shape == {2: (4, 2), 3: (6, 3)}[d]
    assert (np.linalg.norm(points, axis=1) < diameter / 2).all()
    for powers in product(range(4), repeat=d):
        if sum(powers) <= 3:
            expected = ball_moment(powers, diameter / 2)
            np.testing.assert_allclose(
                np.prod(points**powers, axis=1).mean(), expected, rtol=1e-12, atol=1e-12 * diameter ** sum(powers)
            )


@pytest.mark.parametrize("powers", [(2, 0), (0, 4, 0), (2, 2), (2, 1), (2, 2, 2)])
def test_moments_of_a_ball_are_those_of_points_drawn_in_it(powers):
    x = np.random.default_rng(0).uniform(-1, 1, (400_000, len(powers)))
    x = x[np.linalg.norm(x, axis=1) < 1]
    np.testing.assert_allclose(ball_moment(powers, 1.0), np.prod(x**powers, axis=1).mean(), atol=2e-3)


REAL = {  # kind and number of dimensions
    "visium_dlpfc_151673": "hexagonal",
    "visium_lymph_1000spots": "hexagonal",
    "visium_prostate_NP_AC_mini": "hexagonal",
    "st_mob_rep11": "square",
    "iss_coronal_bin50": "square",
    "slideseqv2_hippocampus_dentate_1052": "irregular",
    "starmap_visual_cortex_BY3_1k": "irregular",
    "osmfish_sscortex": "irregular",
    "bdtnp_drosophila_embryo_3d": "irregular",
}


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_spots_are_recognised_and_covered(name):
    points = read(name).obsm["spatial"]
    layout = geometry(points)
    assert layout.kind == REAL[name]
    query = query_lattice(points, spacing=layout.pitch / 2, geometry=layout)
    assert distance_to_spots(points, query).max() < layout.pitch
    assert distance_to_spots(query, points).max() <= layout.support_radius * (1 + 1e-12)
    if name.startswith("visium_dlpfc"):
        assert off_lattice(points, layout).max() < 0.01


@needs_data
@pytest.mark.parametrize("section", ["1", "2", "3", "4"])
def test_each_section_of_a_stack_is_a_lattice_and_the_stack_is_not(section):
    adata = read("st_breast_layers1to4_aligned")
    number = adata.obs["section"].astype(str).to_numpy()
    points = np.asarray(adata.obsm["spatial"])
    layout = geometry(points[number == section])
    assert layout.kind == "square"
    np.testing.assert_allclose(np.linalg.norm(layout.basis, axis=1), 1, atol=0.02)  # in units of the array
    assert geometry(np.column_stack([points, number.astype(float)])).kind == "irregular"
