"""Surfaces from points."""

import dataclasses

import numpy as np
import pytest

from neurst.core.nets import Siren, Spline
from neurst.imaging import FitOptions, LineSearch, SurfaceConfig, fit_surface
from neurst.imaging.surface.planes import local_planes, noise_along, patch_size, turned_alike

RNG = np.random.default_rng(0)
N, RADIUS, SIGMA = 800, 30.0, 0.5
CENTER = np.array([500.0, -20.0, 3.0])
DIRECTIONS = RNG.standard_normal((N, 3))
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
BALL = CENTER + RADIUS * DIRECTIONS + SIGMA * RNG.standard_normal((N, 3))
BENDING = 0.1 * RADIUS
SMALL = {"network": Spline((4, 8)), "steps": 60, "device": "cpu", "progress": False}
CONFIG = SurfaceConfig(
    fit=dataclasses.replace(SurfaceConfig().fit, n_regularisation=256)
)  # enough for a simple body, and faster than the default


def fit(points=BALL, normals=None, *, sigma=None, bending_length=BENDING, **chosen):
    options = FitOptions(**(SMALL | chosen))
    return fit_surface(points, normals, sigma=sigma, bending_length=bending_length, options=options, config=CONFIG)


@pytest.fixture(scope="module")
def ball():
    return fit(steps=100)


def radius(x):
    return np.linalg.norm(x - CENTER, axis=1)


def share_outwards(vertices, faces):
    """Share of the triangles that are counter-clockwise seen from outside of the ball."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return ((np.cross(b - a, c - a) * (a - CENTER)).sum(1) > 0).mean()


# ---- the distance


def test_the_distance_is_negative_inside_and_grows_by_one_per_unit(ball):
    query = CENTER + DIRECTIONS[:100] * np.linspace(0.7, 1.1, 100)[:, None] * RADIUS
    np.testing.assert_allclose(ball.distance(query), radius(query) - RADIUS, atol=0.03 * RADIUS)


def test_projected_points_lie_on_the_zero_set_and_nearer_the_truth(ball):
    moved = ball.project(BALL)
    assert np.abs(ball.distance(moved)).max() < 1e-3
    assert np.abs(radius(moved) - RADIUS).mean() < 0.7 * np.abs(radius(BALL) - RADIUS).mean()


def test_normals_are_of_unit_length_and_point_outwards(ball):
    normals = ball.normals(BALL)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1.0, atol=1e-6)
    assert ((normals * DIRECTIONS).sum(1)).mean() > 0.98


def test_the_slope_at_the_points_is_one_whatever_the_prior_strength(ball):
    for surface in (ball, fit(lam=0.3 * N)):
        up, down = (surface.distance(BALL + t * DIRECTIONS) for t in (0.1, -0.1))
        assert np.median((up - down) / 0.2) == pytest.approx(1.0, abs=0.05)


def test_lengths_are_in_the_units_of_the_points():
    here, there = (
        fit(scale * BALL - shift, bending_length=scale * BENDING, steps=30) for scale, shift in ((1, 0), (137, 7e4))
    )
    query = BALL[:50] + 2.0
    np.testing.assert_allclose(there.distance(137 * query - 7e4) / 137, here.distance(query), atol=0.02 * RADIUS)
    assert there.bending_length == 137 * here.bending_length
    assert there.sigma == pytest.approx(137 * here.sigma)


def test_lam_is_a_strength_for_all_points_and_three_nats_for_each_by_default():
    here, there = fit(lam=3 * N, steps=20), fit(steps=20)
    np.testing.assert_allclose(here.distance(BALL), there.distance(BALL), atol=1e-4 * RADIUS)


def test_the_noise_along_the_normal_is_estimated_or_given(ball):
    assert ball.sigma == pytest.approx(SIGMA, rel=0.2)
    assert fit(sigma=0.7, steps=1).sigma == 0.7


def test_a_sine_network_may_be_the_field():
    moved = fit(network=Siren(width=32, depth=2, omega=6.0), steps=250).project(BALL)
    assert np.abs(radius(moved) - RADIUS).mean() < 0.7 * np.abs(radius(BALL) - RADIUS).mean()


def test_given_normals_of_any_length_say_which_side_is_outside():
    assert fit(normals=-3 * DIRECTIONS, steps=30).distance(CENTER[None])[0] > 0


def test_held_out_points_ask_for_less_bending_of_a_sphere_than_of_a_wavy_one():
    wave = 0.15 * RADIUS * np.sin(9 * DIRECTIONS).sum(1, keepdims=True)
    search = LineSearch(start=4.0, ratio=2.0, max_steps=3, steps=40)
    chosen = {"bending_length": "auto", "network": Spline((12,)), "steps": 1, "search": search}
    even, wavy = (fit(points, **chosen) for points in (BALL, BALL + wave * DIRECTIONS))
    assert even.bending_length >= 2 * wavy.bending_length


# ---- the mesh


def test_the_mesh_of_a_noisy_sphere_is_that_sphere_closed_and_turned_outwards(ball):
    vertices, faces = ball.mesh(np.int16(40))
    assert np.abs(radius(vertices) / RADIUS - 1).mean() < 0.01
    edges = np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)
    assert len(vertices) - len(edges) + len(faces) == 2  # Euler
    assert share_outwards(vertices, faces) > 0.99


def test_holes_stay_open_whatever_the_density_of_the_points(ball):
    height = DIRECTIONS[:, 2]
    uneven = dataclasses.replace(ball, points=BALL[(height > 0) | ((height > -0.5) & (np.arange(N) % 2 == 0))])
    closed, (vertices, faces) = uneven.mesh(40, within=None)[0], uneven.mesh(40)
    low = lambda v: (v - CENTER)[:, 2] / RADIUS
    assert low(closed).min() < -0.95
    assert -0.85 < low(vertices).min() < -0.5
    n_open, n_closed = ((low(v) > -0.4).sum() for v in (vertices, closed))
    assert 0.99 * n_closed < n_open <= n_closed  # where points are sparse is no hole
    assert share_outwards(vertices, faces) > 0.99


def test_a_curve_in_the_plane_has_distances_but_no_mesh():
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = fit(5 * np.stack([np.cos(angle), np.sin(angle)], 1), bending_length=0.5, steps=100)
    inside, outside = circle.distance([[0.5, 0.0], [5.3, 0.0]])
    assert inside < 0 < outside
    np.testing.assert_allclose(np.linalg.norm(circle.project([[4.5, 1.0]]), axis=1), 5.0, rtol=0.02)
    with pytest.raises(ValueError, match="`mesh` needs a surface in 3 dimensions, this one has 2"):
        circle.mesh()


# ---- planes through near points


def test_noise_asks_for_more_points_of_a_plane():
    rng = np.random.default_rng(0)
    flat = np.concatenate([rng.random((2000, 2)), np.zeros((2000, 1))], 1)
    size = {}
    for sigma in (1e-3, 0.012):
        points = flat + sigma * rng.standard_normal(flat.shape) * [0, 0, 1]
        size[sigma] = patch_size(points, 12, 0.15, 96)
        assert noise_along(local_planes(points, size[sigma])[2], size[sigma], 3) == pytest.approx(sigma, rel=0.1)
    assert size[1e-3] == 12 < size[0.012] <= 96


def test_planes_are_turned_outwards_on_each_piece():
    two = np.concatenate([BALL, BALL + [10 * RADIUS, 0, 0]])
    normals = turned_alike(two, local_planes(two, 12)[1], 12)
    assert ((normals * np.tile(DIRECTIONS, (2, 1))).sum(1) > 0).all()


# ---- what is refused

ROWS = np.arange(N)[:, None]
REFUSED = {
    "nan": ({"points": np.where(ROWS == 3, np.nan, BALL)}, ValueError, r"not finite at 1 of 800 points \(first: row 3"),
    "few": ({"points": BALL[:5]}, ValueError, r"`points` has shape \(5, 3\): expected .* with N >= 20"),
    "line": ({"points": ROWS * [1.0, 2.0, 3.0]}, ValueError, "on a line or a plane"),
    "normals": ({"normals": DIRECTIONS[:3]}, ValueError, r"`normals` has shape \(3, 3\): expected .* \(800, 3\)"),
    "no prior": ({"lam": 0.0}, ValueError, "options.lam=0.0.*positive.* without a prior"),
    "another penalty": ({"penalty": "tgv"}, ValueError, "options.penalty='tgv'.*is always `Eikonal`"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fit(**arguments)


READS = {
    r"`query` has shape \(4, 2\)": lambda s: s.distance(np.ones((4, 2))),
    "`within=-1.0`: expected .*'auto'.*positive.*None closes all holes": lambda s: s.mesh(16, within=-1.0),
    "`resolution=1000` is above `max_resolution=512`: .* 1e.09 nodes; raise the limit": lambda s: s.mesh(1000),
}


@pytest.mark.parametrize("message", READS)
def test_a_wrong_argument_of_a_method_is_named(ball, message):
    with pytest.raises(ValueError, match=message):
        READS[message](ball)
