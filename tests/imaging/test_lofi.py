import copy
import tracemalloc

import numpy as np
import pytest
import torch
from skimage import data

from neurst.core import storage
from neurst.core.check import state_of
from neurst.imaging import denoise, metrics
from neurst.imaging.arrays import noise_level
from neurst.imaging.lofi import (
    GeometryConfig,
    LoFi,
    LoFiSpec,
    LoFiTraining,
    Warp,
    fit_lofi,
    learn_geometry,
    load_lofi,
    pretrained_lofi,
)
from neurst.imaging.lofi.net import Filter, LoFiNet
from neurst.imaging.lofi.reading import blurred, grid_patches, mirrored, pyramid, read, read_patches, window

SPECS = {
    "default": {},
    "one network for the patch": {"patch_net": "mlp"},
    "residual": {"head": "residual"},
    "value": {"head": "value"},
    "refined": {"refinements": 2},
    "three channels": {"channels": 3},
    "radial filter": {"filter": "radial", "channels": 2},
    "free filter": {"filter": "free"},
    "other rings": {"radii": (0.0, 1.5, 20.3), "levels": (0, 1, 3), "rays": 5},
}
SHAPE = (37, 52)


def untrained(seed=0, **numbers):
    """A model with random weights and positions; those with a filter do not read a noise level."""
    torch.manual_seed(seed)
    spec = LoFiSpec(**numbers)
    net = LoFiNet(spec, in_noise_units=spec.filter == "none", shape=SHAPE)
    net.positions.data += 0.3 * torch.randn(net.positions.shape)
    for move in net.moves:
        torch.nn.init.normal_(move.mixer.weights[-1], std=0.3)
    if net.filter is not None:
        net.filter.transfer.data += 0.3 * torch.randn(net.filter.transfer.shape)
    return LoFi(net, unit=None if net.in_noise_units else 0.3)


def picture(model, shape=SHAPE, seed=0):
    channels = model.spec.channels
    return np.random.default_rng(seed).random(shape + ((channels,) if channels > 1 else ()))


def level(model):
    return 0.2 if model.net.in_noise_units else None


def pixels(shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 2).astype(float)


@pytest.mark.parametrize("numbers", SPECS.values(), ids=SPECS)
def test_values_on_all_pixels_are_those_at_their_coordinates(numbers):
    model = untrained(**numbers)
    y = picture(model)
    whole = model(y, sigma=level(model))
    one_by_one = model.at(y, pixels(y.shape[:2]), sigma=level(model))
    np.testing.assert_allclose(one_by_one.reshape(whole.shape), whole, atol=1e-5)


@pytest.mark.parametrize("numbers", [v for k, v in SPECS.items() if "filter" not in k], ids=str)
def test_a_shift_by_15_pixels_moves_the_result(numbers):
    model = untrained(**numbers)
    y = picture(model, (110, 80))
    shifted = model(y[15:], sigma=0.2)
    m = model.net.margin()
    assert m < 45
    np.testing.assert_allclose(shifted[m:-m], model(y, sigma=0.2)[15 + m : -m], atol=1e-5)


@pytest.mark.parametrize("name", [k for k in SPECS if "filter" not in k and k != "value"])
@pytest.mark.parametrize(("a", "b"), [(7.0, -1000.0), (1e-6, 3.0), (1e12, 0.0)])
def test_units_do_not_matter(name, a, b):
    model = untrained(**SPECS[name])
    y = picture(model)
    found = model(a * y + b, sigma=0.2 * a)
    np.testing.assert_allclose((found - b) / a, model(y, sigma=0.2), atol=1e-5 + 1e-9 / a)


def test_a_weighted_mean_does_not_leave_a_constant_picture():
    model = untrained()
    np.testing.assert_allclose(model(np.full(SHAPE, 3.0), sigma=0.1), 3.0, rtol=1e-12)


def test_chunks_threads_and_order_do_not_matter(monkeypatch):
    model = untrained()
    y, at = picture(model, (90, 140)), np.random.default_rng(1).uniform(-20, 150, (3000, 2))
    expected, threads = model.at(y, at, sigma=0.2), torch.get_num_threads()
    whole = model(y, sigma=0.2)
    monkeypatch.setattr("neurst.imaging.lofi.net.CHUNK", 77)
    monkeypatch.setattr("neurst.imaging.lofi.model.TILE", 23)
    order = np.random.default_rng(2).permutation(len(at))
    try:
        torch.set_num_threads(2)
        np.testing.assert_allclose(model.at(y, at[order], sigma=0.2), expected[order], atol=1e-5)
        np.testing.assert_allclose(model(y, sigma=0.2), whole, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_one_channel_models_treat_channels_one_by_one():
    model, y = untrained(), np.random.default_rng(0).random((20, 30, 3))
    together = model(y, sigma=0.1)
    for c in range(3):
        np.testing.assert_allclose(together[..., c], model(y[..., c], sigma=0.1), atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool", "float32"])
def test_types_of_pictures(dtype):
    model = untrained()
    y = np.random.default_rng(0).random((20, 30))
    top = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    given = (y * top > 0.5 if dtype == "bool" else (y * top)).astype(dtype)
    expected = model(given.astype(float) / top, sigma=0.1)
    np.testing.assert_allclose(model(given, sigma=0.1), expected, atol=1e-5)
    assert model(given.astype("float32"), sigma=0.1).dtype == np.float32


def test_the_noise_is_estimated_for_each_channel():
    model, y = untrained(), np.random.default_rng(0).standard_normal((60, 60))
    np.testing.assert_array_equal(model(y), model(y, sigma=noise_level(y)))
    np.testing.assert_array_equal(model(np.stack([0.1 * y, y], -1))[..., 1], model(y))


def test_a_result_with_more_pixels_covers_the_same_area():
    model, y = untrained(), picture(untrained())
    twice = model(y, sigma=0.2, shape=(74, 104))
    assert twice.shape == (74, 104)
    at = (pixels((74, 104)) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(twice.ravel(), model.at(y, at, sigma=0.2)[:, 0], atol=1e-5)


def test_positions_without_refinements_are_the_same_at_all_points_and_move_with_them_otherwise():
    y, at = picture(untrained()), np.array([[3.0, 4.0], [20.5, 31.25]])
    plain = untrained().geometry(y, at, sigma=0.2) - at[:, None, None]
    assert plain.shape == (2, 9, 9, 2)
    np.testing.assert_allclose(plain[0], plain[1], atol=1e-6)
    refined = untrained(refinements=1).geometry(y, at, sigma=0.2) - at[:, None, None]
    assert np.abs(refined[0] - refined[1]).max() > 1e-3


# ---- reading


def test_reading_reproduces_pixels_and_mirrors_beyond_the_border():
    y = torch.rand(1, 1, 6, 9, dtype=torch.float64)
    at = torch.from_numpy(pixels((6, 9)))
    torch.testing.assert_close(read(y, at[None, :, None])[0, 0, :, 0], y.flatten())
    outside = torch.tensor([[-2.0, 3.0], [7.0, 10.0]], dtype=torch.float64)
    torch.testing.assert_close(read(y, outside[None, :, None])[0, 0, :, 0], torch.stack([y[0, 0, 2, 3], y[0, 0, 3, 6]]))


def test_windows_are_mirrored_and_memory_mapped_files_stay_on_disk(tmp_path):
    y = np.arange(30.0).reshape(5, 6)
    np.testing.assert_array_equal(window(y, -2, 4, 4, 4), np.pad(y, 20, mode="reflect")[18:22, 24:28])
    assert mirrored(-3, 8, 3).tolist() == [1, 2, 1, 0, 1, 2, 1, 0]
    path = tmp_path / "large.npy"
    np.save(path, np.zeros((3000, 3000), np.float32))
    mapped, model = np.load(path, mmap_mode="r"), untrained()
    tracemalloc.start()
    model.at(mapped, [[1500.0, 1500.0]], sigma=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * 36e6  # the file; checks and moments look at 256 rows at a time


def test_blurring_keeps_constants_and_commutes_with_windows():
    y = torch.rand(1, 2, 40, 50, dtype=torch.float64)
    for k in (1, 2, 3):
        torch.testing.assert_close(blurred(torch.ones_like(y), k), torch.ones_like(y))
    inner = pyramid(y[..., 5:35, 5:45], (0, 2))[2][..., 8:-8, 8:-8]
    torch.testing.assert_close(inner, pyramid(y, (0, 2))[2][..., 13:27, 13:37])


def test_the_convolution_is_the_pointwise_reading():
    torch.manual_seed(0)
    y, offsets = torch.rand(1, 2, 50, 60, dtype=torch.float64), 6 * torch.randn(4, 3, 2, dtype=torch.float64)
    levels, m = (0, 1, 1, 2), 40
    y = torch.nn.functional.pad(y, (m, m, m, m), mode="reflect")
    copies = pyramid(y, levels)
    at = torch.from_numpy(pixels((50, 60))) + m
    torch.testing.assert_close(
        grid_patches(copies, offsets, levels, m), read_patches(copies, at[None], offsets, levels)
    )


# ---- filter


def test_a_filter_keeps_constants_and_a_radial_one_fits_every_shape():
    own = Filter("radial", None)
    own.transfer.data[1:] = 0
    for shape in ((8, 8), (9, 14)):
        y = torch.rand(1, 1, *shape) + 5
        torch.testing.assert_close(own(y), y.mean((2, 3), keepdim=True).expand_as(y), atol=0.2, rtol=0)
        torch.testing.assert_close(own(torch.ones_like(y)), torch.ones_like(y))


# ---- training


def waves(n=3, side=70):
    rows, columns = np.mgrid[:side, : side + 9] / side
    return [np.sin((5 + k) * rows) * np.cos((9 - k) * columns) for k in range(n)]


def test_training_helps_and_a_seed_gives_the_same_model():
    x = waves()
    model = fit_lofi(x[1:], sigma=(0.1, 0.3), steps=60, progress=False)
    again = fit_lofi(x[1:], sigma=(0.1, 0.3), steps=60, progress=False)
    noisy = x[0] + 0.2 * np.random.default_rng(0).standard_normal(x[0].shape)
    assert metrics.psnr(model(noisy, sigma=0.2), x[0]) > metrics.psnr(noisy, x[0]) + 5
    assert all(
        torch.equal(a, b) for a, b in zip(state_of(model.net).values(), state_of(again.net).values(), strict=True)
    )


@pytest.mark.parametrize("numbers", [{}, {"filter": "radial"}, {"filter": "free"}, {"head": "value"}], ids=str)
def test_degraded_inputs_are_drawn_afresh_and_restored(numbers):
    x, seen = waves(), []

    def degrade(clean, rng):
        seen.append(clean)
        noise = rng.standard_normal(clean.shape)
        return clean + 0.2 * (noise + np.roll(noise, 1, 0))  # correlated

    model = fit_lofi(
        x[1:], degrade=degrade, spec=LoFiSpec(**numbers), config=LoFiTraining(refresh_every=2), steps=60, progress=False
    )
    assert len(seen) == 2 + 30
    noisy = degrade(x[0], np.random.default_rng(0))
    assert metrics.psnr(model(noisy), x[0]) > metrics.psnr(noisy, x[0]) + 3


def test_pairs_and_channels():
    rng = np.random.default_rng(0)
    x = [np.stack([a, b], -1) for a, b in zip(waves(), waves()[::-1], strict=True)]
    y = [a + 0.2 * rng.standard_normal(a.shape) for a in x]
    model = fit_lofi(x, inputs=y, spec=LoFiSpec(channels=2, width=16), steps=40, progress=False)
    assert metrics.psnr(model(y[0]), x[0]) > metrics.psnr(y[0], x[0]) + 3


def test_models_that_read_whole_pictures_take_other_shapes():
    x = [np.random.default_rng(0).random(shape) for shape in ((30, 40), (40, 36), (30, 40))]
    for spec in (LoFiSpec(filter="radial", width=8), LoFiSpec(width=8)):
        warp = Warp() if spec.filter == "none" else None
        for seed in range(3):
            fit_lofi(x, inputs=x, spec=spec, warp=warp, steps=6, random_state=seed, progress=False)


def test_a_function_that_degrades_in_place_does_not_change_the_clean_pictures():
    x = waves(1)
    before = x[0].copy()

    def degrade(clean, rng):
        clean += 0.1 * rng.standard_normal(clean.shape)
        return clean

    fit_lofi(x, degrade=degrade, steps=3, progress=False)
    np.testing.assert_array_equal(x[0], before)


def test_a_model_does_not_change_what_it_is_made_of():
    y, at = picture(untrained()), [[3.0, 4.0]]
    model = LoFi(untrained().net, warp=Warp("smooth"))
    first = model.warp.at(at, shape=(9, 9))
    model(y, sigma=0.1)
    np.testing.assert_array_equal(model.warp.at(at, shape=(9, 9)), first)
    one = pretrained_lofi()
    one.net.positions.data.zero_()
    assert float(pretrained_lofi().net.positions.abs().max()) > 1


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_smaller_than_a_window_are_mirrored(channels):
    x = np.random.default_rng(0).random((9, 21, 3))
    model = fit_lofi([x], steps=2, spec=LoFiSpec(channels=channels), progress=False)
    assert model(x, sigma=0.1).shape == x.shape


def test_an_interrupted_training_raises_and_pictures_stay_as_they_were():
    x = waves()
    before = copy.deepcopy(x)

    def degrade(clean, rng):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_lofi(x, degrade=degrade, steps=3, progress=False)
    for a, b in zip(x, before, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- geometry


def test_a_transposition_is_found():
    y = metrics_picture()
    warp = learn_geometry([y], [y.T], config=GeometryConfig(steps=300), progress=False)
    at = np.array([[3.0, 4.0], [40.0, 11.5]])
    np.testing.assert_allclose(warp.at(at, shape=y.T.shape, source=y.shape), at[:, ::-1], atol=0.05)


def metrics_picture(shape=(48, 60)):
    """Smooth random structures."""
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 1, *shape)))
    return 10 * pyramid(noise, (3,))[3][0, 0].numpy() + pyramid(noise, (1,))[1][0, 0].numpy()


def test_a_map_that_bends_is_found_and_trained_with_the_model():
    y = metrics_picture()
    rows, columns = np.mgrid[: y.shape[0], : y.shape[1]].astype(float)
    at = np.stack([rows + 2 * np.sin(columns / 12), columns + 1.5 * np.cos(rows / 12)], -1).reshape(-1, 2)
    target = (
        read(torch.from_numpy(y)[None, None], torch.from_numpy(at)[None, :, None])[0, 0, :, 0].numpy().reshape(y.shape)
    )
    warp = learn_geometry(
        [y], [target], kind="smooth", config=GeometryConfig(steps=300, smooth_steps=600), progress=False
    )
    assert np.abs(warp.at(pixels(y.shape), shape=y.shape) - at).mean() < 0.5
    model = fit_lofi([target], inputs=[y], warp=warp, spec=LoFiSpec(width=16, mixer_width=32), steps=60, progress=False)
    assert metrics.psnr(model(y), target, data_range=np.ptp(y)) > metrics.psnr(y, target, data_range=np.ptp(y)) + 3
    found = model.at(y, pixels(y.shape)).reshape(y.shape)
    np.testing.assert_allclose(found, model(y), atol=1e-5)


# ---- files


@pytest.mark.parametrize("numbers", SPECS.values(), ids=SPECS)
def test_a_saved_model_gives_the_same_values(tmp_path, numbers):
    model = untrained(**numbers)
    if model.spec.filter == "none" and model.spec.channels == 1:
        model = LoFi(model.net, unit=model.unit, warp=Warp("smooth"))
    model.save(tmp_path / "model.safetensors")
    y = picture(model)
    np.testing.assert_array_equal(
        load_lofi(tmp_path / "model.safetensors")(y, sigma=level(model)), model(y, sigma=level(model))
    )


def _stored(tmp_path, **changes):
    model, path = untrained(), tmp_path / "model.safetensors"
    model.save(path)
    kind, content = storage.load(path)
    storage.save(path, changes.pop("kind", kind), content | changes)
    return path


@pytest.mark.parametrize(("changes", "words"), [
    ({"format": 99}, "of format 99: expected 'lofi' of format 1"),
    ({"kind": "learned_tgv"}, "holds 'learned_tgv'"),
    ({"weights": {}}, "(?s)is damaged .*Missing key"),
    ({"spec": {"rays": -1}}, "is damaged .*LoFiSpec.rays=-1"),
    ({"unit": -1.0}, "is damaged .*unit"),
])  # fmt: skip
def test_files_of_other_versions_and_damaged_ones_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        load_lofi(_stored(tmp_path, **changes))


def test_a_cut_file_is_refused(tmp_path):
    path = _stored(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a file that neurst saved, or it is damaged"):
        load_lofi(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_lofi(tmp_path / "none")


# ---- the model in the package


def test_the_shipped_model_denoises_at_all_levels_in_any_unit():
    rows, columns = np.mgrid[:80, :96] / 80
    clean = (np.hypot(rows - 0.5, columns - 0.6) < 0.3) + 0.5 * rows
    for sigma in (0.02, 0.1, 0.3):
        noisy = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)
        restored = denoise(noisy, method="lofi", sigma=sigma)
        assert metrics.psnr(restored, clean) > metrics.psnr(noisy, clean) + 7
        again = denoise(1e3 * noisy, method="lofi", sigma=1e3 * sigma)
        np.testing.assert_allclose(again / 1e3, restored, atol=1e-5)


def test_a_quarter_turn_changes_the_result_of_the_shipped_model_little():
    clean = data.camera()[90:218, 150:278] / 255
    noisy = clean + 0.15 * np.random.default_rng(0).standard_normal(clean.shape)
    model = pretrained_lofi()
    turned = np.rot90(model(np.rot90(noisy), sigma=0.15), -1)
    assert abs(metrics.psnr(turned, clean) - metrics.psnr(model(noisy, sigma=0.15), clean)) < 0.1


# ---- wrong inputs

CLEAN = [np.random.default_rng(0).random((12, 14))]
WRONG = {
    "an array instead of a list": (lambda: fit_lofi(CLEAN[0]), ValueError, r"`clean` is one array .* expected a list"),
    "no pictures": (lambda: fit_lofi([]), ValueError, "`clean` is empty"),
    "a text": (lambda: fit_lofi("folder"), TypeError, "`clean` is a str: expected a list"),
    "NaN in a picture": (lambda: fit_lofi([np.full((9, 9), np.nan)]), ValueError, r"`clean\[0\]` is not finite"),
    "signed integers": (lambda: fit_lofi([np.ones((9, 9), int)]), TypeError, r"`clean\[0\]` holds int64"),
    "other channels": (lambda: fit_lofi([CLEAN[0], np.ones((9, 9, 3))]), ValueError, r"`clean\[1\]` has 3 channels"),
    "both kinds of inputs": (lambda: fit_lofi(CLEAN, inputs=CLEAN, degrade=lambda x, rng: x), ValueError, "both given"),
    "too few inputs": (lambda: fit_lofi(CLEAN, inputs=CLEAN * 2), ValueError, "`inputs` has 2 pictures and `clean` has 1"),
    "other shapes": (lambda: fit_lofi(CLEAN, inputs=[np.ones((9, 9))]), ValueError, r"expected the same shape, or a `warp`"),
    "degrade is no function": (lambda: fit_lofi(CLEAN, degrade=3), TypeError, "`degrade=3`: expected None or a function"),
    "degrade changes the shape": (lambda: fit_lofi(CLEAN, degrade=lambda x, rng: x[1:]), ValueError, "`degrade` gave a picture of shape"),
    "noise levels in the wrong order": (lambda: fit_lofi(CLEAN, sigma=(0.3, 0.1)), ValueError, "the least and the largest noise level"),
    "no noise": (lambda: fit_lofi(CLEAN, sigma=(0.0, 0.1)), ValueError, "`sigma=.*each a positive"),
    "a filter for white noise": (lambda: fit_lofi(CLEAN, spec=LoFiSpec(filter="radial")), ValueError, "a filter is for noise that is correlated"),
    "a warp without inputs": (lambda: fit_lofi(CLEAN, warp=Warp()), ValueError, "`warp` is given without"),
    "steps": (lambda: fit_lofi(CLEAN, steps=0), ValueError, "`steps=0`: expected a whole number >= 1"),
    "spec": (lambda: fit_lofi(CLEAN, spec={"rays": 3}), TypeError, "`spec=.*expected a `LoFiSpec`"),
    "channels of the spec": (lambda: fit_lofi(CLEAN, spec=LoFiSpec(channels=3)), ValueError, "`channels=3` and the pictures have 1"),
    "rings": (lambda: LoFiSpec(radii=(1, 2), levels=(0,)), ValueError, "one level for each radius"),
    "head": (lambda: LoFiSpec(head="mean"), ValueError, "`LoFiSpec.head='mean'`: expected 'weights'"),
    "a picture of one row": (lambda: untrained()(np.ones((1, 9)), sigma=1), ValueError, "at least 4 pixels"),
    "sigma of 0": (lambda: untrained()(CLEAN[0], sigma=0), ValueError, "`sigma=0`: expected the standard deviation of noise"),
    "negative sigma": (lambda: untrained()(CLEAN[0], sigma=-1), ValueError, "`sigma=-1`"),
    "sigma for a model without": (lambda: untrained(filter="radial", channels=2)(np.ones((9, 9, 2)), sigma=1), ValueError, "reads no noise level"),
    "channels of a picture": (lambda: untrained(channels=3)(CLEAN[0], sigma=1), ValueError, "`image` has 1 channels: expected 3"),
    "another shape": (lambda: untrained(filter="free")(CLEAN[0]), ValueError, r"expected \(37, 52\), that of the training"),
    "coordinates": (lambda: untrained().at(CLEAN[0], [1.0, 2.0], sigma=1), ValueError, r"`coords` has shape \(2,\): expected \(N, 2\)"),
    "infinite coordinates": (lambda: untrained().at(CLEAN[0], [[np.inf, 2.0]], sigma=1), ValueError, "`coords` is not finite"),
    "shape of the result": (lambda: untrained()(CLEAN[0], sigma=1, shape=(3,)), ValueError, r"`shape=\(3,\)`: expected None or \(height, width\)"),
    "a number as shape": (lambda: untrained().at(CLEAN[0], [[1.0, 2.0]], sigma=1, shape=3), TypeError, "`shape=3`"),
    "a number as range of levels": (lambda: fit_lofi(CLEAN, sigma=0.1), TypeError, r"`sigma=0.1`: expected \(least, largest\) noise level"),
    "coordinates far away": (lambda: untrained().at(CLEAN[0], [[1e20, 0.0]], sigma=1), ValueError, "`coords` go up to 1e\\+20"),
    "shape of a warp": (lambda: Warp().at([[1.0, 2.0]], shape=5), TypeError, "`shape=5`: expected"),
    "one colour picture": (lambda: fit_lofi(np.ones((20, 20, 3))), ValueError, "expected a list of pictures"),
    "kind of a warp": (lambda: learn_geometry(CLEAN, CLEAN, kind="rigid"), ValueError, "`kind='rigid'`: expected 'affine' or 'smooth'"),
    "pairs of a warp": (lambda: learn_geometry(CLEAN, []), ValueError, "`targets` is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
