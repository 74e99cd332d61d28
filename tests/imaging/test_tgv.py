"""Total (generalised) variation: energies of a cone solver, exact cases, laws, and errors."""

import dataclasses

import numpy as np
import pytest
import torch
from draws import normal, uniform

from neurst.core.grid import grad, symgrad
from neurst.imaging import metrics
from neurst.imaging import operators as op
from neurst.imaging.tgv import SolverConfig, tgv, tv
from neurst.imaging.tgv.problem import BOUND, NORMS, Problem, Ratios
from neurst.imaging.tgv.solver import solve

TIGHT = SolverConfig(tol=1e-7, step_tol=1e-8, max_steps=10_000)
SHAPE = (9, 7)
MASK = np.random.default_rng(0).random(SHAPE) < 0.6
MAPS = np.stack([np.ones(SHAPE), np.linspace(0.2, 1, 7) * np.ones(SHAPE) * 1j])
OPERATORS = {
    "denoising": op.identity(SHAPE),
    "pixels": op.pixel_mask(MASK),
    "average": op.average(3, (9, 6)),
    "blur": op.blur(np.full((2, 2), 0.25), SHAPE),
    "Fourier": op.masked_fourier(MASK),
    "coils": op.multicoil(MASK, MAPS),
    "Radon": op.radon(SHAPE, [0.0, 30.0, 100.0]),
}


def quiet(function):
    return lambda *args, **options: function(*args, progress=False, **options)


tgv, tv = quiet(tgv), quiet(tv)


def matrix(function, shape, *, kind=torch.float64):
    """The dense matrix of a linear function."""
    eye = torch.eye(int(np.prod(shape)), dtype=kind).reshape(-1, *shape)
    return function(eye).reshape(len(eye), -1).T.numpy()


def cone_energy(problem):
    """The smallest energy, by a cone solver."""
    import cvxpy

    a, shape = problem.operator, problem.operator.shape
    kind = torch.complex128 if a.complex else torch.float64
    n = int(np.prod(shape))
    u = cvxpy.Variable(n, complex=a.complex)
    forward = matrix(a.forward, shape, kind=kind)
    data = problem.data[0, 0].flatten().numpy()

    def sizes(expression, parts):
        rows = cvxpy.reshape(expression, (parts, n), order="C")
        return cvxpy.norm(rows, 2, axis=0) if problem.norm != "anisotropic" else cvxpy.norm(rows, 1, axis=0)

    slope, total = matrix(grad, shape) @ u, cvxpy.sum_squares(forward @ u - data) / 2
    weight = lambda m: np.broadcast_to(m[0, 0, 0].numpy(), shape).ravel()
    if problem.second is not None:
        w = cvxpy.Variable(2 * n, complex=a.complex)
        slope = slope - w
        total += weight(problem.second) @ sizes(matrix(symgrad, (2, *shape)) @ w, 3)
    total += weight(problem.first) @ sizes(slope, 2)
    return float(cvxpy.Problem(cvxpy.Minimize(total)).solve(solver="CLARABEL"))


def problem_of(name, *, second=True, norm="joint"):
    a = OPERATORS[name]
    data = normal(1, 1, *a.data_shape, seed=1)
    if a.complex:
        data = torch.complex(data, normal(1, 1, *a.data_shape, seed=2))
    if a.observed is not None:
        data = data * a.observed
    maps = [uniform(1, 1, 1, *a.shape, seed=seed, low=0.02, high=1.0) for seed in (3, 4)]
    return Problem(data, a, maps[0], maps[1] if second else None, norm)


@pytest.mark.parametrize(
    ("name", "norm"),
    [*((name, "joint") for name in OPERATORS), ("denoising", "anisotropic"), ("Fourier", "anisotropic")],
)
@pytest.mark.parametrize("second", [True, False], ids=["tgv", "tv"])
def test_the_energy_with_random_maps_is_that_of_a_cone_solver(name, second, norm):
    problem = problem_of(name, second=second, norm=norm)
    solved = solve(problem, TIGHT)
    found, expected = float(problem.energy(solved.state.u, solved.state.w)), cone_energy(problem)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("second", [True, False], ids=["tgv", "tv"])
def test_the_gap_bounds_the_error_of_the_energy_at_any_time(second):
    flat = torch.full((1, 1, 1, 1, 1), 0.2, dtype=torch.float64)
    problem = dataclasses.replace(problem_of("denoising"), first=flat, second=2 * flat if second else None)
    best = float(problem.energy(*solve(problem, TIGHT).state[:2]))
    for steps in (1, 3, 10, 30, 100, 300):
        solved = solve(problem, SolverConfig(tol=0, step_tol=0, max_steps=steps))
        energy = float(problem.energy(*solved.state[:2]))
        assert (energy - best) / energy <= solved.gap + 1e-9
    assert solved.gap < 0.05


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("second", [True, False], ids=["tgv", "tv"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_gap_holds_for_each_picture_of_a_batch_under_any_norm(norm, second, kind):
    # the second picture is harder, and the gap that is reported is the largest
    data = torch.cat([0.01 * normal(1, 2, 8, 7), normal(1, 2, 8, 7, seed=1)])
    data = torch.complex(data, data.flip(0)) if kind == "complex" else data
    maps = [uniform(2, 1, 1, 8, 7, seed=seed, low=0.05, high=0.6) for seed in (2, 3)]
    problem = Problem(data, op.identity((8, 7)), maps[0], maps[1] if second else None, norm)
    exact = solve(problem, SolverConfig(tol=0, max_steps=8000)).state
    best = problem.energy(exact.u, exact.w)
    for steps in (10, 50, 200):
        solved = solve(problem, SolverConfig(tol=0, max_steps=steps))
        energy = problem.energy(solved.state.u, solved.state.w)
        assert float(((energy - best) / energy).max()) <= solved.gap + 1e-9
        assert (problem.lower_bound(solved.state) <= best * (1 + 1e-9)).all()


def test_total_variation_is_that_of_scikit_image():
    from skimage.restoration import denoise_tv_chambolle

    # its objective is |u - f|^2 / 2 + weight TV(u), and its differences are also 0 beyond the border
    noisy = normal(24, 17).numpy()
    problem = Problem(
        torch.from_numpy(noisy)[None, None], op.identity(noisy.shape), torch.full((1, 1, 1, 1, 1), 0.7).double(), None
    )
    own, other = (
        tv(noisy, first=0.7, config=TIGHT).image,
        denoise_tv_chambolle(noisy, weight=0.7, eps=1e-12, max_num_iter=5000),
    )
    energy = [float(problem.energy(torch.from_numpy(image)[None, None], None)) for image in (own, other)]
    assert energy[0] == pytest.approx(energy[1], rel=1e-4)
    assert energy[0] <= energy[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (7, 4), (8, 8)], ids=str)
def test_an_affine_picture_costs_nothing_and_comes_back(shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    ramp = 2.0 + 0.3 * rows - 0.5 * columns
    slope = grad(torch.from_numpy(ramp))
    problem = Problem(
        torch.from_numpy(ramp)[None, None], op.identity(shape), torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    )
    assert float(problem.energy(torch.from_numpy(ramp)[None, None], slope[None, None])) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(tgv(ramp, first=0.5, config=TIGHT).image, ramp, atol=1e-4)


def test_a_step_loses_what_theory_says():
    step = np.repeat([0.0, 1.0], 10)[:, None] * np.ones((1, 8))  # each side moves by first / its number of rows
    found = tv(step, first=0.6, config=TIGHT).image
    np.testing.assert_allclose(found[:10], 0.06, atol=1e-4)
    np.testing.assert_allclose(found[10:], 0.94, atol=1e-4)


@pytest.mark.parametrize("function", [tgv, tv])
def test_scaled_data_and_weights_give_the_scaled_picture(function):
    noisy = normal(11, 13).numpy()
    one = function(noisy, first=0.3).image
    np.testing.assert_allclose(function(1000 * noisy + 500, first=300.0).image, 1000 * one + 500, rtol=1e-9)
    np.testing.assert_allclose(function(1e-30 * noisy, first=0.3e-30).image, 1e-30 * one, rtol=1e-6)
    single = function((noisy + 300).astype(np.float32), first=0.3).image
    np.testing.assert_allclose(single, one + 300, atol=1e-3)


@pytest.mark.parametrize("c", [1e-4, 1e4])
def test_the_unit_of_an_operator_does_not_matter(c):
    a = OPERATORS["blur"]
    data = normal(*a.data_shape).numpy()
    scaled = dataclasses.replace(
        a, forward=lambda u: c * a.forward(u), adjoint=lambda y: c * a.adjoint(y), norm=c * a.norm
    )
    one, other = tgv(data, a, first=0.05), tgv(c * data, scaled, first=0.05 * c**2)
    np.testing.assert_allclose(other.image, one.image, rtol=1e-6)
    assert other.steps == one.steps


def test_converged_means_that_the_gap_is_small():
    noisy = normal(12, 10).numpy()
    found = tgv(noisy, first=0.4, config=SolverConfig(tol=1e-5, max_steps=5000))
    assert found.converged
    assert found.gap <= 1e-5


@pytest.mark.parametrize("name", OPERATORS)
def test_steps_stay_inside_the_bound_whatever_the_ratios(name):
    problem = problem_of(name)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ratios = Ratios(*(10 ** (6 * torch.rand(1, generator=generator, dtype=torch.float64) - 3) for _ in range(3)))
        (u, w), (p, q) = (tuple(float(s) for s in steps) for steps in problem.step_sizes(ratios, 1.5))
        if problem.operator.prox is None:
            u = 1 / (1 / u - problem.operator.norm**2 / (2 * (2 - 1.5)))  # what remains for the differences
        # the scaled operator itself, as a matrix
        d, e = matrix(grad, problem.operator.shape), matrix(symgrad, (2, *problem.operator.shape))
        scaled = np.block(
            [
                [(p * u) ** 0.5 * d, -((p * w) ** 0.5) * np.eye(len(d))],
                [np.zeros((len(e), d.shape[1])), (q * w) ** 0.5 * e],
            ]
        )
        assert np.linalg.norm(scaled, 2) ** 2 <= BOUND


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("function", [tgv, tv])
def test_a_batch_is_its_pictures_and_channels_share_edges_only_if_joint(function, norm):
    pictures = normal(2, 10, 7, 3).numpy()
    config = SolverConfig(tol=0, step_tol=0, max_steps=200)
    with pytest.warns(UserWarning, match="stopped after 200 steps"):
        both = function(pictures, first=0.4, norm=norm, config=config)
    assert both.image.shape == pictures.shape
    for k in range(2):
        with pytest.warns(UserWarning, match="stopped after 200 steps"):
            one = function(pictures[k], first=0.4, norm=norm, config=config)
        np.testing.assert_allclose(both.image[k], one.image, atol=1e-10)
    with pytest.warns(UserWarning, match="stopped after 200 steps"):
        grey = function(pictures[0, :, :, 1], first=0.4, norm=norm, config=config)
    assert np.allclose(both.image[0, :, :, 1], grey.image, atol=1e-8) == (norm != "joint")
    assert (grey.slopes is None) == (function is tv)
    if function is tgv:
        assert both.slopes.shape == (2, 10, 7, 3, 2)
        assert grey.slopes.shape == (10, 7, 2)


def test_a_complex_picture_turns_with_its_phase():
    a = OPERATORS["Fourier"]
    data = problem_of("Fourier").data[0, 0].numpy()
    one = tgv(data, a, first=0.3, config=TIGHT).image
    np.testing.assert_allclose(tgv(1j * data, a, first=0.3, config=TIGHT).image, 1j * one, atol=1e-6)


def test_a_warm_start_takes_fewer_steps_and_gives_the_same_picture():
    noisy = normal(20, 17).numpy()
    first = tgv(noisy, first=0.5)
    cold, warm = tgv(noisy, first=0.52), tgv(noisy, first=0.52, start=first)
    assert warm.steps < cold.steps
    np.testing.assert_allclose(warm.image, cold.image, atol=0.02)


def test_data_where_nothing_is_observed_may_be_anything():
    noisy = normal(*SHAPE).numpy()
    one = tgv(np.where(MASK, noisy, np.nan), OPERATORS["pixels"], first=0.3).image
    np.testing.assert_array_equal(one, tgv(np.where(MASK, noisy, 7.0), OPERATORS["pixels"], first=0.3).image)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_the_dtype_is_kept_within_single_and_double(dtype):
    expected = {2: np.float32, 4: np.float32}.get(np.dtype(dtype).itemsize, np.float64)
    assert tgv(normal(8, 8).numpy().astype(dtype), first=0.1).image.dtype == expected
    assert tgv(np.full((6, 6), 255, np.uint8), first=0.1).image.max() == pytest.approx(1)


def drawing(n=48):
    rows, columns = np.mgrid[:n, :n] / n
    return np.where(np.hypot(rows - 0.5, columns - 0.5) < 0.3, 0.8 - 0.5 * rows, 0.3 * columns)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_without_any_argument_the_weight_is_nearly_the_best(sigma):
    clean = drawing()
    noisy = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)
    score = lambda solution: metrics.psnr(solution.image, clean)
    best = max(score(tgv(noisy, first=factor * sigma)) for factor in (0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2))
    found = tgv(noisy)
    assert score(found) > best - 0.3
    assert found.second == pytest.approx(2 * found.first)
    assert tgv(noisy, first="discrepancy").first > found.first


def test_with_an_operator_the_weight_is_nearly_the_best_too():
    clean = drawing()
    a = op.masked_fourier(op.cartesian_mask(clean.shape, 2))
    rng = np.random.default_rng(0)
    noise = 0.05 * (rng.standard_normal(clean.shape) + 1j * rng.standard_normal(clean.shape)) / 2**0.5
    data = a.forward(torch.from_numpy(clean + 0j)).numpy() + noise
    score = lambda solution: metrics.psnr(np.abs(solution.image), clean)
    best = max(score(tgv(data, a, first=factor * 0.05)) for factor in (0.1, 0.2, 0.4, 0.7, 1.2))
    assert score(tgv(data, a, sigma=0.05)) > best - 0.5


def broken():
    good = OPERATORS["blur"]
    return dataclasses.replace(good, adjoint=lambda y: 2 * good.adjoint(y))


NOISY = normal(*SHAPE).numpy()
WRONG = {
    "text": (lambda: tgv("a"), TypeError, "`data='a'`"),
    "whole numbers with a sign": (lambda: tgv(np.ones((3, 3), int)), TypeError, "`data` holds int64"),
    "one axis": (lambda: tgv(np.ones(5)), ValueError, r"`data` has shape \(5,\): expected \(H, W\)"),
    "empty": (lambda: tgv(np.ones((0, 5))), ValueError, r"`data` has shape \(0, 5\)"),
    "NaN": (lambda: tgv(np.full((3, 3), np.nan)), ValueError, "`data` is not finite at 9 entries"),
    "data of another shape": (lambda: tgv(np.ones((3, 3)), OPERATORS["average"], first=1), ValueError, r"expected \(3, 2\), .*the operator gives"),
    "a weight of 0": (lambda: tgv(NOISY, first=0), ValueError, "`first=0`: expected"),
    "a negative map": (lambda: tgv(NOISY, first=-np.ones(SHAPE)), ValueError, "`first=.*not positive"),
    "a map of another shape": (lambda: tgv(NOISY, first=np.ones((3, 3))), ValueError, r"`first` has shape \(3, 3\)"),
    "another rule": (lambda: tgv(NOISY, first="best"), ValueError, "`first='best'`: expected 'sure'"),
    "a rule for second": (lambda: tgv(NOISY, first=1.0, second="sure"), ValueError, "`second='sure'` with `first=1.0`"),
    "a second weight with a rule": (lambda: tgv(NOISY, second=1.0), ValueError, "`second=1.0` with `first='sure'`"),
    "an unknown noise level": (lambda: tgv(np.ones((9, 7)), OPERATORS["Fourier"]), ValueError, "`sigma=None`: the noise level"),
    "no noise": (lambda: tgv(NOISY, sigma=0), ValueError, "`sigma=0` with `first='sure'`"),
    "no operator": (lambda: tgv(NOISY, np.ones((3, 3)), first=1), TypeError, "`operator=.*`: expected None or a `neurst.imaging"),
    "a wrong adjoint": (lambda: tgv(np.ones((8, 6)), broken(), first=1), ValueError, "`operator`: the adjoint fails the dot test"),
    "a norm that is too small": (
        lambda: tgv(np.ones((8, 6)), dataclasses.replace(OPERATORS["blur"], norm=0.1), first=1), ValueError, "`operator.norm=0.1`"),
    "an operator on the wrong axis": (
        lambda: tgv(NOISY, dataclasses.replace(op.identity(SHAPE), forward=lambda u: u.flip(0), adjoint=lambda u: u.flip(0)), first=1),
        ValueError, "`operator.forward` gives a picture in a batch other data"),
    "a wrong proximal map": (
        lambda: tgv(NOISY, dataclasses.replace(op.identity(SHAPE), prox=lambda x, data, t: 0 * x), first=1), ValueError, "`operator.prox"),
    "a forward of another shape": (
        lambda: tgv(NOISY, dataclasses.replace(op.identity(SHAPE), forward=lambda u: u[..., :3]), first=1), ValueError, "`operator.forward` gives"),
    "a NaN operator": (
        lambda: tgv(NOISY, dataclasses.replace(op.identity(SHAPE), prox=None, forward=lambda u: u * np.nan), first=1), ValueError, "`operator"),
    "no noise to be found": (lambda: tgv(np.ones((9, 8))), ValueError, "`sigma=None`: the estimated noise level is 0"),
    "a start of another problem": (
        lambda: tgv(NOISY, first=1, start=tv(NOISY, first=1)), ValueError, "`start` is a solution of another problem"),
    "another norm": (lambda: tgv(NOISY, first=1, norm="l2"), ValueError, "`norm='l2'`: expected 'joint'"),
    "relaxation of 2": (lambda: SolverConfig(relaxation=2.0), ValueError, "`SolverConfig.relaxation=2.0`"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call()
