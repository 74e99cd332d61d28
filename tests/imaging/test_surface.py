import dataclasses

import numpy as np
import pytest

from neurst.core.nets import Siren, Spline
from neurst.imaging.planes import local_planes, noise_along, patch_size, turned_alike
from neurst.imaging.surface import fit_surface

RNG = np.random.default_rng(0)
N, RADIUS, SIGMA = 800, 30.0, 0.5
CENTER = np.array([500.0, -20.0, 3.0])
DIRECTIONS = RNG.standard_normal((N, 3))
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
BALL = CENTER + RADIUS * DIRECTIONS + SIGMA * RNG.standard_normal((N, 3))
SMALL = {"network": Spline((4, 8)), "bend": 0.1, "steps": 150, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def ball():
    return fit_surface(BALL, **SMALL)


def radius(x):
    return np.linalg.norm(x - CENTER, axis=1)


def test_the_mesh_of_a_noisy_sphere_is_that_sphere_closed_and_turned_outwards(ball):
    vertices, faces = ball.mesh(40)
    assert np.abs(radius(vertices) / RADIUS - 1).mean() < 0.01
    edges = np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)
    assert len(vertices) - len(edges) + len(faces) == 2  # Euler
    a, b, c = vertices[faces].transpose(1, 0, 2)
    assert ((np.cross(b - a, c - a) * (a - CENTER)).sum(1) > 0).mean() > 0.99


def test_the_mesh_does_not_depend_on_the_blocks_it_is_read_in(ball):
    vertices, _ = ball.mesh(33)
    assert np.abs(ball.distance(vertices)).max() < 0.1


def test_what_is_far_from_every_point_may_be_left_out(ball):
    cap = dataclasses.replace(ball, points=BALL[DIRECTIONS[:, 2] > 0])
    vertices, faces = cap.mesh(24, within=0.2 * RADIUS)
    assert faces.max() == len(vertices) - 1
    assert -0.5 * RADIUS < (vertices - CENTER)[:, 2].min() < 0
    assert len(cap.mesh(24, within=None)[0]) > 1.5 * len(vertices)


def test_holes_stay_open_whatever_the_density_of_the_points(ball):
    height = DIRECTIONS[:, 2]
    uneven = dataclasses.replace(ball, points=BALL[(height > 0) | ((height > -0.5) & (np.arange(N) % 2 == 0))])
    closed, (vertices, faces) = uneven.mesh(40, within=None)[0], uneven.mesh(40)
    low = lambda v: (v - CENTER)[:, 2] / RADIUS
    assert low(closed).min() < -0.95
    assert -0.85 < low(vertices).min() < -0.5
    assert (low(vertices) > -0.4).sum() == (low(closed) > -0.4).sum()  # sparse is no hole
    a, b, c = vertices[faces].transpose(1, 0, 2)
    assert ((np.cross(b - a, c - a) * (a - CENTER)).sum(1) > 0).mean() > 0.99


@pytest.mark.parametrize("within", [0.0, -1.0, np.inf, "all"])
def test_a_reach_that_is_no_distance_is_refused(ball, within):
    with pytest.raises(ValueError, match="`within=.*expected a positive distance"):
        ball.mesh(16, within=within)


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


def test_the_noise_along_the_normal_is_estimated(ball):
    assert ball.sigma == pytest.approx(SIGMA, rel=0.2)


def test_units_do_not_matter(ball):
    moved = fit_surface(1e3 * BALL - 7e4, **SMALL)
    query = BALL[:50] + 2.0
    np.testing.assert_allclose(moved.distance(1e3 * query - 7e4) / 1e3, ball.distance(query), atol=0.02 * RADIUS)


def test_a_sine_network_may_be_the_field():
    moved = fit_surface(BALL, **(SMALL | {"network": Siren(width=32, depth=2, omega=6.0), "steps": 300})).project(BALL)
    assert np.abs(radius(moved) - RADIUS).mean() < 0.7 * np.abs(radius(BALL) - RADIUS).mean()


def test_points_held_out_ask_for_less_bending_of_a_sphere_than_of_a_wavy_one():
    wave = 0.15 * RADIUS * np.sin(9 * DIRECTIONS).sum(1, keepdims=True)
    arguments = {"network": Spline((6, 12)), "bend": "auto", "steps": 60}
    even, wavy = (fit_surface(points, **(SMALL | arguments)) for points in (BALL, BALL + wave * DIRECTIONS))
    assert even.bend >= 2 * wavy.bend


def test_the_slope_at_the_points_is_one_whatever_the_prior_strength(ball):
    weak = fit_surface(BALL, lam=0.3, **SMALL)
    for surface in (ball, weak):
        up, down = (surface.distance(BALL + t * DIRECTIONS) for t in (0.1, -0.1))
        assert np.median((up - down) / 0.2) == pytest.approx(1.0, abs=0.05)


def test_given_normals_say_which_side_is_outside():
    inward = fit_surface(BALL, -3 * DIRECTIONS, **(SMALL | {"steps": 60}))
    assert inward.distance(CENTER[None])[0] > 0


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


def test_a_curve_in_the_plane_has_distances_but_no_mesh():
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = fit_surface(5 * np.stack([np.cos(angle), np.sin(angle)], 1), **(SMALL | {"steps": 100}))
    inside, outside = circle.distance([[0.5, 0.0], [5.3, 0.0]])
    assert inside < 0 < outside
    np.testing.assert_allclose(np.linalg.norm(circle.project([[4.5, 1.0]]), axis=1), 5.0, rtol=0.02)
    with pytest.raises(ValueError, match="`mesh` needs a surface in 3 dimensions, this one has 2"):
        circle.mesh()


LINE = np.linspace(0, 1, 50)[:, None] * [1.0, 2.0, 3.0]
WRONG = {
    "nan": (
        {"points": np.where(np.arange(N)[:, None] == 3, np.nan, BALL)},
        r"not finite at 1 of 800 points \(first: row 3",
    ),
    "few": ({"points": BALL[:5]}, "`points` has 5 rows: a surface needs at least 20"),
    "line": ({"points": LINE}, "on a line or a plane"),
    "plane": ({"points": BALL * [1, 1, 0]}, "on a line or a plane"),
    "identical": ({"points": np.ones((50, 3))}, "all 50 `points` are the same"),
    "one dimension": ({"points": BALL[:, :1]}, r"`points` has shape \(800, 1\)"),
    "normals": ({"normals": DIRECTIONS[:3]}, r"`normals` has shape \(3, 3\): expected that of `points`, \(800, 3\)"),
    "zero normal": (
        {"normals": np.where(np.arange(N)[:, None] == 2, 0, DIRECTIONS)},
        r"no direction at 1 of 800 points \(first: row 2",
    ),
    "lam": ({"lam": -1.0}, "`lam=-1.0`: expected a positive, finite number"),
    "bend": ({"bend": -1.0}, "`bend=-1.0`: expected a finite number >= 0"),
    "sigma": ({"sigma": 0.0}, "`sigma=0.0`"),
    "steps": ({"steps": 0.5}, "`steps=0.5`"),
    "network": ({"network": "mlp"}, "`network='mlp'` is unknown"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_with_what_to_do(arguments, message):
    arguments = {"points": BALL} | arguments
    with pytest.raises(ValueError, match=message):
        fit_surface(**(SMALL | arguments))


@pytest.mark.parametrize("query", [np.ones((4, 2)), np.ones(3)])
def test_a_query_of_other_dimension_is_refused(ball, query):
    with pytest.raises(ValueError, match="`query` has shape"):
        ball.distance(query)


def test_sparse_points_of_a_body_with_a_hole_are_drawn_onto_it():
    rng = np.random.default_rng(0)
    u, v = 2 * np.pi * rng.random((2, 1000))
    ring = 1 + 0.4 * np.cos(v)
    torus = np.stack([ring * np.cos(u), ring * np.sin(u), 0.4 * np.sin(v)], 1)
    points = torus + 0.015 * rng.standard_normal(torus.shape)
    off = lambda p: np.abs(np.hypot(np.hypot(p[:, 0], p[:, 1]) - 1, p[:, 2]) - 0.4).mean()
    surface = fit_surface(points, steps=250, progress=False)
    outward = np.stack([np.cos(v) * np.cos(u), np.cos(v) * np.sin(u), np.sin(v)], 1)
    assert off(surface.project(points)) < 0.7 * off(points)
    assert ((surface.normals(torus) * outward).sum(1) > 0.8).mean() > 0.95
