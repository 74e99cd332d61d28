from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from neurst.spatial.geometry import disc_quadrature, distinct, geometry, overlap, spacing_ratio

VECTORS = {"hexagonal": np.array([[1.0, 0.0], [0.5, np.sqrt(3) / 2]]), "square": np.eye(2)}


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


def uneven_grid():
    """The directions of a square lattice, uneven distances."""
    x, y = np.cumsum(np.random.default_rng(0).uniform(0.5, 2.0, (2, 12)), axis=1)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def off_lattice(points, layout):
    """Distance of each point to the lattice of a geometry, in pitches."""
    index = (points - layout.origin) @ np.linalg.inv(layout.basis)
    return np.linalg.norm((index - np.rint(index)) @ layout.basis, axis=1) / layout.pitch


def same_lattice(a, b, atol):
    change = a @ np.linalg.inv(b)
    return np.allclose(change, np.rint(change), atol=atol) and np.isclose(abs(np.linalg.det(change)), 1, atol=atol)


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize(
    ("angle", "scale", "jitter"),
    [(0.0, 137.0, 0.0), (0.5, 137.0, 0.04), (2.9, 1e-3, 0.04)],
)
def test_a_lattice_is_found_whatever_its_orientation_scale_and_place(kind, angle, scale, jitter):
    points, basis = lattice(kind, angle=angle, scale=scale, jitter=jitter)
    layout = geometry(points)
    assert layout.kind == kind
    assert same_lattice(layout.basis, basis, atol=0.02 if jitter else 1e-8)
    assert off_lattice(points, layout).max() < (0.2 if jitter else 1e-8)
    assert layout.pitch == pytest.approx(scale, rel=2e-3)  # the lattice constant, which jitter does not shorten
    assert layout.support_radius == pytest.approx(1.05 * layout.pitch)


@pytest.mark.parametrize(("kind", "jitter"), [("hexagonal", 0.07), ("square", 0.03), ("square", 0.07)])
def test_a_wide_jittered_lattice_does_not_drift(kind, jitter):
    points, _ = lattice(kind, n=80, angle=0.3, scale=137.0, jitter=jitter)
    exact, _ = lattice(kind, n=80, angle=0.3, scale=137.0)
    assert off_lattice(exact, geometry(points)).max() < 0.02


@pytest.mark.parametrize(("kind", "share"), [("hexagonal", 0.3), ("square", 0.5)])
def test_a_random_subset_of_a_lattice_is_that_lattice(kind, share):
    points, basis = lattice(kind, n=60, angle=0.3)
    layout = geometry(points[np.random.default_rng(0).random(len(points)) < share])
    assert layout.kind == kind
    assert same_lattice(layout.basis, basis, atol=1e-6)


IRREGULAR = {
    "random": uniform(),
    "random in space": uniform(d=3),
    "rectangular": np.stack(np.meshgrid(np.arange(9) * 1.6, np.arange(8.0)), axis=-1).reshape(-1, 2),
    "an uneven grid": uneven_grid(),
    "a diagonal line": np.outer(np.arange(20), [1.0, 1.0]),
    "cubic": np.stack(np.meshgrid(*[np.arange(4.0)] * 3), axis=-1).reshape(-1, 3),
}


@pytest.mark.parametrize("points", IRREGULAR.values(), ids=IRREGULAR)
def test_other_positions_are_irregular(points):
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
    again = np.random.default_rng(1).permutation(np.concatenate([points, points, points[:9]]))
    np.testing.assert_array_equal(distinct(again), distinct(points))
    for name, value in vars(geometry(points)).items():
        np.testing.assert_array_equal(getattr(geometry(again), name), value)
    assert spacing_ratio(again) == spacing_ratio(points)


@pytest.mark.parametrize("d", [2, 3])
def test_the_quadrature_of_a_spot_is_exact_up_to_degree_3(d):
    diameter = 55.0
    points = disc_quadrature(diameter, d)
    assert points.shape == {2: (4, 2), 3: (6, 3)}[d]
    assert (np.linalg.norm(points, axis=1) < diameter / 2).all()
    for powers in product(range(4), repeat=d):
        if sum(powers) <= 3:  # mean of a monomial over a disc or ball of radius R: that of x^2 is R^2 / (d + 2)
            even = {(): 1.0, (2,): (diameter / 2) ** 2 / (d + 2)}
            expected = even.get(tuple(p for p in powers if p), 0.0)
            found = np.prod(points**powers, axis=1).mean()
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * diameter ** sum(powers))


RATIOS = {  # positions, and the expected ratio with its tolerance
    "hexagonal": (lattice("hexagonal", n=60)[0], 1.0, 0.05),
    "square": (lattice("square", n=60)[0], 1.0, 0.03),
    "cubic": (np.stack(np.meshgrid(*[np.arange(16.0)] * 3), axis=-1).reshape(-1, 3), 1.0, 0.15),
    "random": (uniform(9000), np.sqrt(np.log(2) / np.pi), 0.02),  # of a Poisson process, by its median nearest distance
    "pairs of a lattice": (np.concatenate([lattice("square", n=30)[0] + shift for shift in (0, 0.01)]), 0.0, 0.03),
}


@pytest.mark.parametrize(("points", "expected", "tolerance"), RATIOS.values(), ids=RATIOS)
def test_the_spacing_ratio_is_one_on_lattices_half_at_random_and_zero_for_pairs(points, expected, tolerance):
    assert spacing_ratio(points) == pytest.approx(expected, abs=tolerance)
    assert spacing_ratio(1000 * points) == pytest.approx(spacing_ratio(points), rel=1e-6)


SECTION = lattice("square", n=30)[0]
LEFT = SECTION[:, 0] < SECTION[:, 0].mean()
LABELS = np.random.default_rng(7).random(len(SECTION))
GROUPS = {  # positions of two or more groups, whether two of them cover the same area
    "two sections in one frame": ([SECTION, SECTION + 0.3], True),
    "two sections at the same places": ([SECTION, SECTION], True),
    "two halves": ([SECTION[LEFT], SECTION[~LEFT]], False),
    "layers": (np.array_split(SECTION[SECTION[:, 1].argsort(kind="stable")], 5), False),
    "sections side by side": ([SECTION, SECTION + [40, 0]], False),
    "one section": ([SECTION], False),
    "intermixed labels of a lattice": ([SECTION[LABELS < 0.5], SECTION[LABELS >= 0.5]], False),
}


@pytest.mark.parametrize(("groups", "expected"), GROUPS.values(), ids=GROUPS)
def test_sections_in_one_frame_overlap_and_parts_of_one_section_do_not(groups, expected):
    points, labels = np.concatenate(groups), np.repeat([f"s{k}" for k in range(len(groups))], [len(g) for g in groups])
    assert overlap(points, labels) is expected
    assert overlap(50 * points[::-1], labels[::-1]) is expected
