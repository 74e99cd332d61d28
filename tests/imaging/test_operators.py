"""Operators: the laws of each, and the errors of their makers."""

import numpy as np
import pytest
import torch
from draws import normal

from neurst.core.check import adjoints_match
from neurst.imaging import operators as op

SHAPE = (12, 9)
MASK = np.random.default_rng(0).random(SHAPE) < 0.4
MAPS = np.random.default_rng(1).standard_normal((3, *SHAPE)) * (1 + 0.5j)
UV = np.random.default_rng(3).uniform(-np.pi, np.pi, (2100, 2))  # more than one chunk
OPERATORS = {
    "identity": op.identity(SHAPE),
    "pixel_mask": op.pixel_mask(MASK),
    "blur": op.blur(np.random.default_rng(2).standard_normal((3, 4)), SHAPE),
    "average": op.average(3, SHAPE),
    "masked_fourier": op.masked_fourier(MASK),
    "multicoil": op.multicoil(MASK, MAPS),
    "radon": op.radon(SHAPE, [0.0, 10.0, 45.0, 90.0, 151.0]),
    "radon of a row": op.radon((1, 5), [0.0, 33.0]),
    "lensing": op.lensing(SHAPE),
    "lensing, even sides": op.lensing((8, 6)),
    "interferometer": op.interferometer(SHAPE, UV),
    "interferometer of a pixel": op.interferometer((1, 1), UV),
    "one pixel": op.identity((1, 1)),
}
WITH_PROX = [name for name, each in OPERATORS.items() if each.prox]


def numbers(shape, kind, seed):
    real = normal(*shape, seed=seed)
    return torch.complex(real, normal(*shape, seed=seed + 50)) if kind else real


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=["one", "batch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_adjoint_passes_the_dot_test_and_shapes_are_as_stated(name, lead):
    a = OPERATORS[name]
    x, y = numbers((*lead, *a.shape), a.complex, 0), numbers((*lead, *a.data_shape), a.complex, 1)
    adjoints_match(a.forward, a.adjoint, x, y, rtol=1e-12)
    assert a.forward(x).shape == y.shape
    assert a.adjoint(y).shape == x.shape


@pytest.mark.parametrize("name", OPERATORS)
def test_the_norm_is_an_upper_bound_and_not_a_loose_one(name):
    a = OPERATORS[name]
    x = numbers(a.shape, a.complex, 3)
    for _ in range(200):
        x = a.adjoint(a.forward(x / x.norm()))
    found = float(x.norm()) ** 0.5
    assert found <= a.norm * (1 + 1e-12)
    loose = {"blur": 0.4, "radon": 0.8, "radon of a row": 0.7, "multicoil": 0.5, "interferometer": 0.99}
    assert found > loose.get(name, 1 - 1e-9) * a.norm


@pytest.mark.parametrize("single", [False, True], ids=["double", "single"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_normal_operator_is_the_adjoint_of_the_forward_one_also_after_division_by_the_norm(name, single):
    a = OPERATORS[name]
    x = numbers((2, *a.shape), a.complex, 6)
    x = x.to(torch.complex64 if a.complex else torch.float32) if single else x
    tolerance = 1e-4 if single else 1e-12
    for each in (a, a.normalised()):
        expected = each.adjoint(each.forward(x))
        assert (each.apply_normal(x) - expected).norm() <= tolerance * expected.norm()
        assert each.apply_normal(x).dtype == x.dtype


@pytest.mark.parametrize("name", WITH_PROX)
def test_a_proximal_map_solves_its_equation(name):
    a, t = OPERATORS[name], 0.7
    x, data = numbers(a.shape, a.complex, 4), numbers(a.data_shape, a.complex, 5)
    if a.observed is not None:
        data = data * a.observed
    u = a.prox(x, data, t)  # t A'(A u - data) + u - x = 0
    torch.testing.assert_close(t * a.adjoint(a.forward(u) - data) + u, x, rtol=1e-12, atol=1e-12)


def test_values_where_nothing_is_observed_are_not_read():
    a = OPERATORS["pixel_mask"]
    data = torch.where(torch.from_numpy(MASK), normal(*SHAPE), torch.nan)
    u = a.prox(normal(*SHAPE, seed=1), data, 2.0)
    assert torch.isfinite(u).all()


def test_the_radon_transform_of_a_disc_is_its_chords():
    n, radius = 65, 20.0
    rows, columns = np.mgrid[:n, :n] - (n - 1) / 2
    a = op.radon((n, n), [0.0, 30.0, 77.0])
    sinogram = a.forward(torch.from_numpy(np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1))).numpy()
    at = np.arange(sinogram.shape[1]) - (sinogram.shape[1] - 1) / 2
    chords = 2 * np.sqrt(np.clip(radius**2 - at**2, 0, None))
    inside = np.abs(at) < 0.9 * radius
    np.testing.assert_allclose(sinogram[:, inside], np.broadcast_to(chords[inside], (3, inside.sum())), atol=0.5)


def test_the_radon_transform_turns_with_the_picture():
    u = normal(16, 16)
    a = op.radon((16, 16), [20.0, 110.0])
    torch.testing.assert_close(a.forward(u)[0], a.forward(torch.rot90(u, -1))[1], rtol=1e-9, atol=1e-9)


def test_a_pixel_is_shared_by_the_two_nearest_detectors():
    a = op.radon((5, 7), np.arange(0, 180, 7.0))
    u = torch.zeros(5, 7, dtype=torch.float64)
    u[0, 6] = 2.0
    views = a.forward(u)
    torch.testing.assert_close(views.sum(1), torch.full((len(views),), 2.0, dtype=torch.float64))
    at = torch.arange(a.data_shape[1], dtype=torch.float64) - (a.data_shape[1] - 1) / 2
    angles = np.radians(np.arange(0, 180, 7.0))
    expected = torch.from_numpy(3 * np.cos(angles) - 2 * np.sin(angles))  # 3 to the right, 2 above the middle
    torch.testing.assert_close((views * at).sum(1) / 2, expected)


@pytest.mark.parametrize("window", [None, "hann"])
@pytest.mark.parametrize("shape", [(48, 48), (41, 56)])
def test_filtered_back_projection_inverts_the_radon_transform(shape, window):
    angles = np.arange(0, 180, 1.5)
    rows, columns = np.mgrid[: shape[0], : shape[1]] - np.array(shape)[:, None, None] / 2
    picture = np.exp(-((rows - 4) ** 2 + (columns + 6) ** 2) / 40) + 0.5 * np.exp(-((rows + 8) ** 2 + columns**2) / 60)
    sinogram = op.radon(shape, angles).forward(torch.from_numpy(np.stack([picture, -2 * picture])))
    found = op.filtered_back_projection(sinogram, shape, angles, window=window)
    assert np.abs(found[0] - picture).max() < (0.06 if window is None else 0.12)
    np.testing.assert_allclose(found[1], -2 * found[0])
    assert op.filtered_back_projection(sinogram.float(), shape, angles).dtype == np.float32


@pytest.mark.parametrize("name", ["lensing", "lensing, even sides"])
def test_lensing_keeps_the_norm_and_its_adjoint_is_its_inverse(name):
    a = OPERATORS[name]
    kappa = normal(2, *a.shape)
    torch.testing.assert_close(a.adjoint(a.forward(kappa)), kappa, rtol=1e-12, atol=1e-12)


def test_the_shear_of_a_round_mass_is_tangential():
    rows, columns = np.mgrid[:33, :33] - 16
    kappa = np.exp(-(rows**2 + columns**2) / 18)
    first, second = op.lensing((33, 33)).forward(torch.from_numpy(kappa - kappa.mean())).numpy()
    angle = np.arctan2(rows, columns)
    near = (np.hypot(rows, columns) > 3) & (np.hypot(rows, columns) < 8)
    assert (first * np.cos(2 * angle) + second * np.sin(2 * angle))[near].max() < 0  # minus the tangential shear
    assert np.abs(first * np.sin(2 * angle) - second * np.cos(2 * angle))[near].max() < 0.01


def test_shape_noise_falls_with_the_root_of_the_number_of_galaxies():
    assert op.shape_noise(2.0, dispersion=0.3, density=50.0) == pytest.approx(0.03)


def test_an_interferometer_sums_waves():
    u = normal(*SHAPE).numpy()
    found = OPERATORS["interferometer"].forward(torch.from_numpy(u)).numpy()
    p, q = np.indices(SHAPE)
    expected = [(u * np.exp(-1j * (uv[0] * p + uv[1] * q))).sum() for uv in UV[:5]]
    np.testing.assert_allclose(found[0, :5] + 1j * found[1, :5], expected, rtol=1e-10)


def test_blur_is_a_correlation_with_the_kernel():
    from scipy.signal import correlate2d

    u, kernel = normal(8, 7), np.arange(6.0).reshape(2, 3)
    found = op.blur(kernel, (8, 7)).forward(u)
    np.testing.assert_allclose(found, correlate2d(u.numpy(), kernel, mode="valid"))


def test_coils_of_a_smooth_object_are_found_up_to_a_phase():
    rows, columns = np.mgrid[:40, :48] / 40
    picture = np.exp(-((rows - 0.5) ** 2 + (columns - 0.6) ** 2) / 0.1)
    maps = np.stack([1 + 0.5 * rows, 1 - 0.3j * columns, 0.5 + 0.2 * rows * columns])
    maps /= np.sqrt((abs(maps) ** 2).sum(0))
    found = op.coil_maps(np.fft.fft2(maps * picture))
    np.testing.assert_allclose((abs(found) ** 2).sum(0), 1)
    same = abs((found * maps.conj()).sum(0))  # 1 if they are equal up to a phase at each pixel
    assert same[picture > 0.1].min() > 0.99


@pytest.mark.parametrize(("speed", "seed"), [(2, 0), (4, 1), (8, 2)])
def test_a_mask_keeps_the_stated_share_and_the_middle(speed, seed):
    mask = op.cartesian_mask((10, 256), speed, random_state=seed)
    assert mask.shape == (10, 256)
    assert (mask == mask[0]).all()
    assert mask[0].sum() == 256 // speed
    assert mask[0, [0, 1, 2, 3, -1, -2, -3]].all()
    assert (mask != op.cartesian_mask((10, 256), speed, random_state=seed + 1)).any()
    low = np.abs(np.fft.fftfreq(256)) < 0.1
    assert mask[0, low].mean() > 1.5 * mask[0, ~low].mean()


WRONG = {
    "a shape of one number": (lambda: op.identity(5), TypeError, r"`shape=5`: expected \(H, W\)"),
    "an empty side": (lambda: op.identity((0, 4)), ValueError, r"`shape\[0\]=0`: expected a whole number >= 1"),
    "numbers as mask": (
        lambda: op.pixel_mask(np.ones((3, 3))),
        TypeError,
        "`mask` is an array of float64 .* expected booleans",
    ),
    "nothing observed": (
        lambda: op.pixel_mask(np.zeros((3, 3), bool)),
        ValueError,
        r"`mask` of shape \(3, 3\) is False everywhere",
    ),
    "a mask in 3-D": (lambda: op.masked_fourier(np.ones((3, 3, 3), bool)), ValueError, r"`mask` .* shape \(3, 3, 3\)"),
    "a large kernel": (
        lambda: op.blur(np.ones((5, 5)), (4, 9)),
        ValueError,
        "`kernel` of shape .* larger than the picture",
    ),
    "a kernel of zeros": (lambda: op.blur(np.zeros((2, 2)), (4, 9)), ValueError, "`kernel` .* not all of them 0"),
    "a kernel with NaN": (lambda: op.blur([[np.nan]], (4, 9)), ValueError, "`kernel` .* finite"),
    "no multiple": (lambda: op.average(2, (4, 9)), ValueError, r"`shape=\(4, 9\)`: expected multiples of `factor=2`"),
    "maps of another size": (
        lambda: op.multicoil(MASK, MAPS[:, :3]),
        ValueError,
        r"`maps` .* expected numbers \(n_coils, 12, 9\)",
    ),
    "maps of zeros": (lambda: op.multicoil(MASK, 0 * MAPS), ValueError, "`maps` .* 0 everywhere"),
    "frequencies in wavelengths": (
        lambda: op.interferometer(SHAPE, [[4e3, 0.0]]),
        ValueError,
        "`uv` goes up to 4e\\+03: expected angular frequencies",
    ),
    "entries that do not fit the data": (
        lambda: op.Operator(SHAPE, (3,), sum, sum, 1.0, observed=torch.ones(4)),
        ValueError,
        "`Operator.observed` has shape",
    ),
    "no angles": (lambda: op.radon(SHAPE, []), ValueError, r"`angles` has shape \(0,\)"),
    "NaN among angles": (lambda: op.radon(SHAPE, [0, np.nan]), ValueError, "`angles` .* finite"),
    "data of another transform": (
        lambda: op.filtered_back_projection(np.ones((2, 8)), SHAPE, [0.0, 90.0]),
        ValueError,
        r"`sinogram` has shape \(2, 8\): expected finite numbers \(\.\.\., 2, 15\)",
    ),
    "NaN in a sinogram": (
        lambda: op.filtered_back_projection(np.full((1, 15), np.nan), SHAPE, [0.0]),
        ValueError,
        "`sinogram` .* finite",
    ),
    "an unknown window": (
        lambda: op.filtered_back_projection(np.ones((1, 15)), SHAPE, [0.0], window="ramp"),
        ValueError,
        "`window='ramp'`: expected None or 'hann'",
    ),
    "lensing of a number": (lambda: op.lensing(4), TypeError, r"`shape=4`: expected \(H, W\)"),
    "pixels without area": (lambda: op.shape_noise(0.0), ValueError, "`pixel_area=0.0`: expected a positive"),
    "no galaxies": (lambda: op.shape_noise(1.0, density=0.0), ValueError, "`density=0.0`: expected a positive"),
    "frequencies in three columns": (
        lambda: op.interferometer(SHAPE, np.ones((4, 3))),
        ValueError,
        r"`uv` has shape \(4, 3\): expected finite numbers \(M, 2\)",
    ),
    "no frequencies": (lambda: op.interferometer(SHAPE, np.ones((0, 2))), ValueError, r"`uv` has shape \(0, 2\)"),
    "NaN among frequencies": (lambda: op.interferometer(SHAPE, [[0.0, np.nan]]), ValueError, "`uv` .* finite"),
    "complex frequencies": (lambda: op.interferometer(SHAPE, [[1j, 0]]), TypeError, "`uv` cannot be read"),
    "a normal that is no function": (
        lambda: op.Operator((2, 2), (2, 2), abs, abs, 1.0, normal=3),
        TypeError,
        "`Operator.normal=3`: expected a function",
    ),
    "slower than full": (lambda: op.cartesian_mask((4, 64), 0.5), ValueError, "`acceleration=0.5`: expected"),
    "a wide centre": (
        lambda: op.cartesian_mask((4, 64), 8, centre=20),
        ValueError,
        "`centre=20`: expected at most the 8",
    ),
    "real k-space": (lambda: op.coil_maps(np.ones((2, 4, 4))), ValueError, "`kspace` is an array of float64"),
    "k-space of zeros": (lambda: op.coil_maps(np.zeros((2, 4, 4), complex)), ValueError, "`kspace` is 0 at all"),
    "a norm of 0": (lambda: op.Operator((2, 2), (2, 2), abs, abs, 0.0), ValueError, "`Operator.norm=0.0`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call()
