import numpy as np
import pytest
from real import needs_data, read
from scipy.spatial.distance import cdist

from neurst.spatial.geometry import geometry, kd_tree
from neurst.spatial.support import UNIT, Cloud, Stack, TooManyPoints, query_lattice, support_of


def grid(nx, ny, start=0.0):
    """Spots with distance 1 on a square lattice, from (start, 0)."""
    return np.stack(np.meshgrid(np.arange(float(nx)) + start, np.arange(float(ny))), axis=-1).reshape(-1, 2)


def turned(kind, angle, scale=1.0, n=12):
    """About n x n spots of a lattice with distance `scale`, turned by an angle."""
    index = np.stack(np.meshgrid(np.arange(-2 * n, 2 * n), np.arange(-2 * n, 2 * n)), axis=-1).reshape(-1, 2)
    points = index @ UNIT[kind]
    points = points[(np.abs(points) <= n / 2).all(1)]
    return points @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]] * scale


def uniform(n, d=2, seed=0):
    return np.random.default_rng(seed).random((n, d)) * 100


def stack_of(*sections, heights):
    return np.concatenate([np.column_stack([s, np.full(len(s), z)]) for s, z in zip(sections, heights, strict=True)])


# ---- lattices of points

QUERIES = {  # positions, lattice, its vectors for spacing 1 (None: those of the spots), spacing and radius in pitches
    "auto on hexagonal": (turned("hexagonal", 0.4), "auto", None, 0.37, None),
    "auto on square": (turned("square", 0.4), "auto", None, 0.8, 2.3),
    "auto on irregular": (uniform(80), "auto", np.eye(2), 1.0, None),
    "cubic": (uniform(40, 3), "cubic", np.eye(3), 0.37, None),
    "hexagonal on hexagonal": (turned("hexagonal", 0.4), "hexagonal", None, 2.1, 0.9),
    "hexagonal on square": (turned("square", 0.4), "hexagonal", UNIT["hexagonal"], 0.37, None),
    "one point": (turned("square", 0.4), "square", None, 0.1, 0.25),
}


@pytest.mark.parametrize(("points", "kind", "unit", "step", "radius"), QUERIES.values(), ids=QUERIES)
def test_a_query_lattice_is_every_lattice_point_within_the_radius(points, kind, unit, step, radius):
    layout = geometry(points)
    unit = layout.basis / layout.pitch if unit is None else unit
    spacing, radius = step * layout.pitch, layout.support_radius if radius is None else radius * layout.pitch
    at = (points - layout.origin) @ np.linalg.inv(unit * spacing)  # the brute force looks at the box of the tissue
    reach = int(2 * radius / spacing) + 2
    sides = [np.arange(a, b) for a, b in zip(np.floor(at.min(0)) - reach, np.ceil(at.max(0)) + reach + 1, strict=True)]
    index = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(unit))
    every = layout.origin + index @ (unit * spacing)
    nearest = np.concatenate([cdist(part, points).min(1) for part in np.array_split(every, 1 + len(every) // 10_000)])
    query = query_lattice(points, spacing=spacing, lattice=kind, radius=radius)
    np.testing.assert_allclose(query, every[nearest <= radius], atol=1e-9 * layout.pitch)


def test_one_missing_spot_is_filled_and_the_middle_of_a_larger_hole_is_not():
    points = turned("hexagonal", 0.2)
    middle, layout = points[[len(points) // 2]], geometry(points)
    from_middle = cdist(points, middle)[:, 0]
    for hole, filled in {0.1: True, 1.1: False}.items():
        left = points[from_middle > hole]
        query = query_lattice(left, spacing=layout.pitch, layout=layout)
        assert (cdist(middle, query).min() < 1e-6) == filled
        assert Cloud(left, layout, layout.support_radius).contains(middle)[0] == filled


CLOUD, SECTIONS = uniform(50), stack_of(grid(9, 9), grid(9, 9), heights=(0.0, 5.0))
REFUSED = {  # spots, arguments, what the error says
    "no spacing": (CLOUD, {"spacing": 0.0}, "`spacing=0.0`: expected a positive, finite length"),
    "a spacing next to nothing": (CLOUD, {"spacing": 1e-300}, "`spacing=1e-300` is far from"),
    "an unknown lattice": (CLOUD, {"kind": "hex"}, "`lattice='hex'`: in 2-d expected one of 'auto', 'hexagonal'"),
    "a lattice of the plane": (uniform(50, 3), {"kind": "hexagonal"}, "in 3-d expected one of 'auto', 'cubic'"),
    "a tiny spacing of a stack": (SECTIONS, {"spacing": 1e-5}, "spacing 1e-05 would have about"),
    "a spacing of a stack next to nothing": (SECTIONS, {"spacing": 1e-300}, "`spacing=1e-300` is far from"),
    "a lattice of the plane for a stack": (SECTIONS, {"kind": "square"}, "in 3-d expected one of 'auto', 'cubic'"),
}


@pytest.mark.parametrize(("spots", "arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_a_lattice_that_cannot_be_is_refused(spots, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        support_of(spots).lattice(**arguments)
    assert len(str(error.value)) < 300


SUPPORTS = {
    "a lattice": turned("hexagonal", 0.3, 137.0),
    "cells in space": uniform(100, 3),
    "a stack of equal sections": stack_of(grid(12, 12), grid(12, 12), grid(12, 12), heights=(0.0, 5.0, 9.0)),
    "a stack of two halves": stack_of(grid(12, 24), grid(12, 24, start=12), heights=(0.0, 5.0)),
}


@pytest.mark.parametrize("spots", SUPPORTS.values(), ids=SUPPORTS)
def test_too_many_points_are_refused_with_a_count_near_the_truth_and_a_spacing_that_fits(spots):
    support = support_of(spots)
    for factor in (1, 5):
        n = len(support.lattice(factor=factor))
        assert len(support.lattice(factor=factor, max_points=n)) == n
        with pytest.raises(TooManyPoints) as error:
            support.lattice(factor=factor, max_points=n // 10)
        assert error.value.count == pytest.approx(n, rel=0.3)
    with pytest.raises(TooManyPoints, match="with a spacing of") as error:
        support.lattice(factor=1000, max_points=5000)
    suggested = float(str(error.value).split("with a spacing of ")[1].split()[0])
    assert 1000 < len(support.lattice(spacing=suggested, max_points=5000)) <= 5000


# ---- clouds


@pytest.mark.parametrize("d", [2, 3])
def test_a_cloud_is_all_points_within_the_radius_of_a_spot(d):
    spots, points = uniform(60, d), uniform(500, d, seed=1) * 2 - 50
    support, layout, nearest = support_of(spots), geometry(spots), cdist(points, spots).min(1)
    np.testing.assert_allclose(support.distance(points), nearest)
    np.testing.assert_array_equal(support.contains(points), nearest <= layout.support_radius)
    np.testing.assert_array_equal(support_of(spots, 4.0).contains(points), nearest <= 4.0)
    assert 0.05 < support.contains(points).mean() < 0.95
    some = support.restricted_to(spots[:20])
    np.testing.assert_array_equal(some.contains(points), cdist(points, spots[:20]).min(1) <= layout.support_radius)
    lattice = query_lattice(spots, spacing=layout.pitch / 1.5)
    np.testing.assert_array_equal(support.lattice(factor=1.5), lattice)
    np.testing.assert_array_equal(support.lattice(spacing=layout.pitch / 1.5), lattice)
    assert support.contains(lattice).all()


# ---- stacks

HALVES = stack_of(grid(11, 21, start=-10), grid(17, 21, start=-10), heights=(0.0, 2.0))  # x <= 0, and x <= 6


def test_few_distinct_heights_are_a_stack_and_others_a_cloud():
    assert isinstance(support_of(HALVES), Stack)
    jittered = HALVES + [0, 0, 1] * np.random.default_rng(0).normal(0, 0.01, (len(HALVES), 1))
    for spots in (jittered, HALVES[:, :2], HALVES[HALVES[:, 2] == 0], uniform(500, 3)):
        assert isinstance(support_of(spots), Cloud)


def test_between_two_half_planes_the_outline_of_a_stack_is_interpolated():
    support = support_of(HALVES)
    x, t = np.meshgrid(np.arange(-3.0, 15.0), np.linspace(0, 1, 41))
    points = np.column_stack([x.ravel(), np.full(x.size, 7.0), 2 * t.ravel()])  # at places of spots in the plane
    distance = (1 - t) * np.maximum(x, 0) + t * np.maximum(x - 6, 0)
    np.testing.assert_array_equal(support.contains(points), distance.ravel() <= 1.05)
    np.testing.assert_allclose(support.distance(points), cdist(points, HALVES).min(1))
    found = support.lattice(factor=4)
    assert support.contains(found).all()
    widths = [found[np.isclose(found[:, 2], z), 0].max() for z in (0.0, 0.5, 1.0, 1.5, 2.0)]
    np.testing.assert_allclose(widths, [1.0, 1.25, 2.0, 4.0, 7.0])  # the largest x with (1 - t) x <= 1.05


@pytest.mark.parametrize("spots", [HALVES, SUPPORTS["a stack of equal sections"] * [1, 1, -1] + [0, 0, 300]])
def test_a_stack_holds_its_spots_and_nothing_above_or_below_or_at_the_side(spots):
    support, (low, high) = support_of(spots), (spots[:, 2].min(), spots[:, 2].max())
    assert support.contains(spots).all()
    assert support.contains([[0.0, 5.0, z] for z in np.linspace(low, high, 99)]).all()
    for z in (low - 0.01, high + 0.01):
        assert not support.contains(np.column_stack([spots[:, :2], np.full(len(spots), z)])).any()
    assert not support.contains(spots + [100.0, 0, 0]).any()


def test_a_stack_restricted_to_some_spots_keeps_its_scale_and_loses_sections_without_any():
    spots = SUPPORTS["a stack of equal sections"]  # at heights 0, 5 and 9
    support = support_of(spots)
    lower = support.restricted_to(spots[spots[:, 2] < 9])
    outer = support.restricted_to(spots[spots[:, 2] != 5])
    corner = support.restricted_to(spots[(spots[:, 2] == 5) & (spots[:, 0] < 4)])
    at = np.array([[2.0, 2.0, 7.0], [2.0, 2.0, 5.0], [9.0, 2.0, 5.0]])
    for part, expected in ((lower, [0, 1, 1]), (outer, [1, 1, 1]), (corner, [0, 1, 0])):
        assert (part.pitch, part.radius) == (support.pitch, support.radius)
        np.testing.assert_array_equal(part.contains(at), np.array(expected, bool))
        lattice = part.lattice(factor=1)
        assert part.contains(lattice).all()
        assert lattice[:, 2].max() == part.heights[-1]


LEVELS = [
    ({"factor": 1}, [0, 5, 9]),
    ({"factor": 2}, [0, 2.5, 5, 7, 9]),
    ({"spacing": 2.0}, [0, 5 / 3, 10 / 3, 5, 7, 9]),  # at most 2 from each other, sections among them
]


@pytest.mark.parametrize(("options", "levels"), LEVELS, ids=str)
def test_the_lattice_of_a_stack_has_levels_at_and_between_its_sections(options, levels):
    spots = SUPPORTS["a stack of equal sections"]
    found = support_of(spots).lattice(**options)
    np.testing.assert_allclose(np.unique(found[:, 2].round(9)), levels)
    plane = query_lattice(grid(12, 12), spacing=options.get("spacing", 1 / options.get("factor", 1)))
    for z in levels:
        np.testing.assert_allclose(found[np.isclose(found[:, 2], z), :2], plane, atol=1e-9)
    if "factor" in options:  # every spot is among them
        assert cdist(spots, found).min(1).max() < 1e-9


# ---- real sections

REAL = {
    "visium_dlpfc_151673": "hexagonal",
    "st_mob_rep11": "square",
    "slideseqv2_hippocampus_dentate_1052": "irregular",
    "bdtnp_drosophila_embryo_3d": "irregular",
}


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_spots_are_recognised_and_covered(name):
    spots = np.asarray(read(name).obsm["spatial"], float)
    support = support_of(spots)
    assert isinstance(support, Cloud)
    assert support.layout.kind == REAL[name]
    query = support.lattice(factor=2)
    assert kd_tree(query).query(spots)[0].max() < support.pitch
    assert support.contains(query).all()
    if name.startswith("visium_dlpfc"):
        index = (spots - support.layout.origin) @ np.linalg.inv(support.layout.basis)
        assert np.abs(index - np.rint(index)).max() < 0.01


@needs_data
def test_real_sections_above_each_other_are_a_stack_of_lattices():
    adata = read("st_breast_layers1to4_aligned")
    number = adata.obs["section"].astype(float).to_numpy()
    support = support_of(np.column_stack([np.asarray(adata.obsm["spatial"]), number]))
    assert isinstance(support, Stack)
    assert [layout.kind for layout in support.layouts] == ["square"] * 4
    assert support.pitch == pytest.approx(1, abs=0.02)  # in units of the array
    assert support.contains(support.spots).all()
    assert support.contains(support.lattice(factor=2)).all()
