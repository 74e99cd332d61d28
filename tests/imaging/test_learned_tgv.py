"""Learned weights: laws of the maps, training, and files."""

import dataclasses

import numpy as np
import pytest
import torch
from draws import normal
from skimage import data

from neurst.core.check import state_of
from neurst.core.train import TrainConfig
from neurst.imaging import FitOptions, ImageConfig, denoise, metrics
from neurst.imaging import operators as op
from neurst.imaging.tgv import (
    LearnedConfig,
    LearnedTGV,
    SolverConfig,
    add_noise,
    fit_reconstructor,
    pretrained_denoiser,
    tgv,
    tv,
)

SMALL = LearnedConfig(width=4, free_steps=4, kept_steps=3)


def trained(config=SMALL):
    """A model whose maps vary in space, though nothing has taught it."""
    model = LearnedTGV(config)
    torch.nn.init.normal_(model.net.net.head.weight, std=20.0, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.mark.parametrize("second", [True, False], ids=["tgv", "tv"])
def test_an_untrained_model_is_the_classic_solver(second):
    noisy = normal(10, 13).numpy()
    model = LearnedTGV(dataclasses.replace(SMALL, slopes=second))
    classic = tgv(noisy, first=0.8, progress=False) if second else tv(noisy, first=0.8, progress=False)
    np.testing.assert_allclose(model.reconstruct(noisy, sigma=1.0), classic.image, atol=0.02)
    first, other = model.maps(noisy, sigma=1.0)
    np.testing.assert_allclose(first, 0.8, rtol=1e-6)
    assert (other is None) != second


@pytest.mark.parametrize("first_steps", [0, 10])
@pytest.mark.parametrize("kind", ["denoising", "Fourier"])
@pytest.mark.parametrize("unit", ["sigma", "rms"])
def test_maps_follow_the_scale_of_the_data_and_ignore_their_mean(unit, kind, first_steps):
    model = trained(dataclasses.replace(SMALL, unit=unit, first_steps=first_steps))
    a = op.masked_fourier(op.cartesian_mask((16, 20), 2)) if kind == "Fourier" else None
    data = normal(16, 20).numpy()
    data = data if a is None else a.forward(torch.from_numpy(data + 0j)).numpy()
    one = model.maps(data, a, sigma=0.3)
    for k, scaled in enumerate(model.maps(50 * data, a, sigma=15.0)):
        np.testing.assert_allclose(scaled, 50 * one[k], rtol=1e-4)
        assert one[k].std() > 0.01 * one[k].mean()
    if a is None:
        for k, shifted in enumerate(model.maps(data + 7, sigma=0.3)):
            np.testing.assert_allclose(shifted, one[k], rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 2), (13, 10)], ids=str)
def test_pictures_of_any_size_are_read(shape):
    noisy = normal(*shape).numpy()
    model = trained()
    assert model.reconstruct(noisy, sigma=0.5).shape == shape
    assert model.maps(noisy, sigma=0.5)[0].shape == shape


def test_a_batch_is_its_pictures_and_channels_share_maps():
    pictures, model = normal(2, 9, 8, 3).numpy(), trained()
    both = model.maps(pictures, sigma=0.5)[0]
    assert both.shape == (2, 9, 8)
    np.testing.assert_allclose(both[1], model.maps(pictures[1], sigma=0.5)[0], rtol=1e-5)
    assert model.reconstruct(pictures, sigma=0.5).shape == pictures.shape


def test_the_maps_do_not_depend_on_the_phase_of_a_complex_picture():
    a, model = op.masked_fourier(op.cartesian_mask((12, 16), 2)), trained()
    data = a.forward(torch.complex(normal(12, 16), normal(12, 16, seed=1))).numpy()
    np.testing.assert_allclose(model.maps(1j * data, a, sigma=0.3)[0], model.maps(data, a, sigma=0.3)[0], rtol=1e-4)


def test_the_network_reads_a_first_solution_with_the_untrained_weights():
    seen = torch.rand(14, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    a, data = op.pixel_mask(seen.numpy()), normal(14, 12).numpy()
    data = np.where(seen, data - data[seen].mean(), 0)
    model = trained(dataclasses.replace(SMALL, first_steps=400, ratio=1.0))
    first = tgv(data, a, first=0.8, config=SolverConfig(step_tol=1e-5, max_steps=9000), progress=False).image
    direct = trained(SMALL).eval()
    rms = np.std(data)  # in both models the unit in which the network reads the picture
    with torch.no_grad():
        picture, noise = (
            torch.from_numpy(np.asarray(x)).float().reshape(1, 1, *np.shape(x) or (1, 1)) for x in (first, 1.0)
        )
        expected = direct.net(picture, torch.full_like(noise, rms), noise).exp()[0]
    found = model.maps(data, a, sigma=1.0)
    for k in range(2):
        np.testing.assert_allclose(found[k], expected[k], rtol=0.05)


def test_a_network_may_read_the_data_beside_the_first_solution():
    a, data = op.masked_fourier(op.cartesian_mask((16, 20), 2)), normal(16, 20).numpy() + 0j
    both = trained(dataclasses.replace(SMALL, first_steps=10, reads_both=True))
    one = both.maps(data, a, sigma=0.3)[0]
    weight = both.net.net.down[0][0].weight
    assert weight.shape[1] == 3
    weight.data[:, 1] = 0  # blind for A'f
    assert np.abs(both.maps(data, a, sigma=0.3)[0] - one).max() > 1e-3 * one.mean()


def test_complex_data_are_read_with_their_mean():
    a, model = op.masked_fourier(op.cartesian_mask((16, 16), 2)), trained()
    k = a.forward(torch.complex(normal(16, 16), normal(16, 16, seed=1)) + 3).to(torch.complex64)
    sigma, measured = torch.tensor([0.3]), k[None, None]
    with torch.no_grad():
        problem, _, _ = model.predicted(measured, a, sigma)
    np.testing.assert_allclose(model.maps(k.numpy(), a, sigma=0.3)[0], problem.first[0, 0, 0], rtol=1e-4)


def test_the_gradient_at_the_minimum_is_that_of_full_unrolling_in_direction():
    noisy, clean = normal(2, 1, 12, 12).float(), torch.zeros(2, 1, 12, 12)
    slopes = []
    for free, kept in ((0, 400), (300, 60)):
        model = trained(dataclasses.replace(SMALL, free_steps=free, kept_steps=kept))
        found = model(noisy, op.identity((12, 12)), torch.full((2,), 0.4))
        (found - clean).square().mean().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.net.parameters()]))
    assert torch.cosine_similarity(*slopes, dim=0) > 0.95


def test_what_training_keeps_for_the_gradient_is_small():
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = LearnedTGV()  # 12 steps with a gradient
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model(normal(6, 1, 64, 64).float(), op.identity((64, 64)), torch.full((6,), 0.4))
    assert found.requires_grad
    assert 20e6 < sum(kept.values()) < 200e6  # bytes


def steps_picture(n=48):
    rows, columns = np.mgrid[:n, :n] // 8
    return ((rows + columns) % 2) * 0.6 + 0.01 * columns


def test_training_lowers_the_error_on_pictures_that_were_not_seen():
    model = LearnedTGV(dataclasses.replace(SMALL, first_start=0.2, second_start=0.4, free_steps=60, kept_steps=12))
    noisy = steps_picture().T + 0.2 * np.random.default_rng(1).standard_normal((48, 48))
    error = lambda: np.abs(model.reconstruct(noisy, sigma=0.2) - steps_picture().T).mean()
    before = error()
    config = TrainConfig(steps=100, learning_rate=0.005, device="cpu")
    history = fit_reconstructor(
        model, [steps_picture()], add_noise(0.1, 0.3), config, patch=24, batch=4, progress=False
    )
    assert history["loss"][-1] < history["loss"][0]
    assert error() < 0.8 * before


def test_the_same_seed_trains_the_same_model():
    states = []
    for _ in range(2):
        model = LearnedTGV(SMALL, random_state=3)
        fit_reconstructor(model, [steps_picture()], add_noise(0.1, 0.3), TrainConfig(steps=3), patch=16, progress=False)
        states.append(state_of(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(
        LearnedTGV(SMALL, random_state=4).net.net.down[0][0].weight, LearnedTGV(SMALL).net.net.down[0][0].weight
    )


def test_a_saved_model_gives_the_same_numbers(tmp_path):
    model, noisy = trained(), normal(11, 12).numpy()
    model.save(tmp_path / "a.safetensors")
    loaded = LearnedTGV.load(tmp_path / "a.safetensors")
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.reconstruct(noisy, sigma=0.4), model.reconstruct(noisy, sigma=0.4))


def damaged(path):
    LearnedTGV(SMALL).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def of_another_kind(path):
    from neurst.core import storage

    storage.save(path, "field", {"format": 1})
    return path


def test_the_model_of_the_package_denoises_a_photograph_that_it_has_not_seen():
    clean = data.camera()[100:228, 160:288] / 255
    noisy = clean + 0.1 * np.random.default_rng(2).standard_normal(clean.shape)
    score = lambda image: metrics.psnr(image, clean)
    found = score(denoise(noisy, method="learned_tgv", options=QUIET))
    assert found > score(tgv(noisy, progress=False).image)
    assert found > score(noisy) + 5
    np.testing.assert_array_equal(denoise(clean, method="learned_tgv", sigma=0.0, options=QUIET), clean)
    weights = pretrained_denoiser().log_ratios
    weights.data += 1.0  # a copy: the model of the package stays as it is
    assert not torch.equal(weights, pretrained_denoiser().log_ratios)


QUIET, NOISY = FitOptions(progress=False), normal(9, 8).numpy()
WRONG = {
    "nothing to read beside": (lambda p: LearnedConfig(reads_both=True), ValueError, "`LearnedConfig.reads_both=True` with `first_steps=0`"),
    "no noise": (lambda p: LearnedTGV(SMALL).reconstruct(NOISY, sigma=0), ValueError, "`sigma=0`: expected"),
    "negative noise": (lambda p: LearnedTGV(SMALL).reconstruct(NOISY, sigma=-1), ValueError, "`sigma=-1`: expected"),
    "NaN": (lambda p: LearnedTGV(SMALL).maps(np.full((3, 3), np.nan)), ValueError, "`data` is not finite"),
    "no file": (lambda p: LearnedTGV.load(p), FileNotFoundError, "there is no such file"),
    "a damaged file": (lambda p: LearnedTGV.load(damaged(p)), ValueError, "is not a file that neurst saved, or it is damaged"),
    "a field": (lambda p: LearnedTGV.load(of_another_kind(p)), ValueError, "holds 'field' .* expected 'learned_tgv'"),
    "no pictures": (lambda p: fit_reconstructor(LearnedTGV(SMALL), [], add_noise(0.1, 0.2)), ValueError, "`pictures` is empty"),
    "small pictures": (
        lambda p: fit_reconstructor(LearnedTGV(SMALL), [NOISY], add_noise(0.1, 0.2)), ValueError, r"`pictures\[0\]` .* `patch=64`"),
    "pictures with NaN": (
        lambda p: fit_reconstructor(LearnedTGV(SMALL), [np.full((70, 70), np.nan)], add_noise(0.1, 0.2)), ValueError, r"`pictures\[0\]` .* finite"),
    "options of a fit": (
        lambda p: denoise(NOISY, method="learned_tgv", options=FitOptions(lam=3.0)), ValueError, "`options` sets `lam=3.0` with"),
    "numbers of a fit": (
        lambda p: denoise(NOISY, method="learned_tgv", config=ImageConfig(steps=9)), ValueError, "`config` sets `steps=9` with"),
    "another method": (lambda p: denoise(NOISY, method="tgv"), ValueError, "`method='tgv'`: expected 'neurtv', 'learned_tgv' or 'lofi'"),
    "another unit": (lambda p: LearnedConfig(unit="dB"), ValueError, "`LearnedConfig.unit='dB'`: expected 'sigma' or 'rms'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name, tmp_path):
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call(tmp_path / "a.safetensors")


def test_the_solver_config_is_used():
    model, errors = trained(), []
    exact = model.reconstruct(NOISY, sigma=0.5, config=SolverConfig(tol=1e-6, max_steps=20_000))
    for steps in (3, 100):
        with pytest.warns(UserWarning, match=f"stopped after {steps} steps"):
            found = model.reconstruct(NOISY, sigma=0.5, config=SolverConfig(tol=0.0, max_steps=steps))
        errors.append(np.abs(found - exact).max())
    assert errors[1] < 0.5 * errors[0]
