import dataclasses

import numpy as np
import pytest
import torch
from heldout import spread_of

from neurst.spatial.gaussian_process import features_at, spectral_variance
from neurst.spatial.spread import CERTAIN, Spread

DIMS = pytest.mark.parametrize("d", [1, 2, 3])


def points(d, n=11):
    return torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (n, d)))


@DIMS
def test_the_variance_is_that_of_channels_loadings_and_intercepts(d):
    spread, x = spread_of(d), points(d)
    phi = features_at(spread.network, x).double().numpy()
    z, expected = phi @ spread.coefficients, np.zeros((11, 7))
    for c, length in enumerate([0.25, 1.0, 0.25]):
        k = int(length == 1.0)
        prior = np.diag(spectral_variance(spread.network, d, length).numpy())
        left = prior - spread.frames[k] * spread.informed[k][:, c] @ spread.frames[k].T
        each = spread.variance[c] * np.einsum("ni,ij,nj->n", phi, left, phi).clip(0)
        expected += np.outer(each, spread.loadings[:, c] ** 2)
    for g in range(7):
        information = spread.axes * spread.information @ spread.axes.T * spread.gene_information[g]
        covariance = np.linalg.inv(np.eye(3) / spread.gene_unit[g] ** 2 + information)
        expected[:, g] += np.einsum("nr,rs,ns->n", z, covariance, z) + 1 / spread.gene_information[g]
    np.testing.assert_allclose(spread.predictor_variance(x), spread.scale * expected, rtol=1e-4)
    assert spread.predictor_variance(points(d, 0)).shape == (0, 7)


def test_a_selection_of_genes_has_their_variances():
    spread, x, index = spread_of(), points(2), np.array([4, 0, 4])
    np.testing.assert_allclose(spread.select(index).predictor_variance(x), spread.predictor_variance(x)[:, index])


def test_among_all_genes_those_that_do_not_vary_have_no_variance():
    spread, x, index = spread_of(n_genes=3), points(2), np.array([5, 1, 2])
    found = spread.among(8, index).predictor_variance(x)
    np.testing.assert_allclose(found[:, index], spread.predictor_variance(x))
    others = np.delete(found, index, 1)
    assert others.shape == (11, 5)
    assert others.max() < 1e3 / CERTAIN


@DIMS
def test_a_stored_spread_is_read_back_with_the_same_numbers(d):
    spread, x = spread_of(d), points(d)
    again = Spread.from_dict(spread.to_dict(), d, 7)
    np.testing.assert_array_equal(again.predictor_variance(x), spread.predictor_variance(x))
    for f in dataclasses.fields(Spread):
        np.testing.assert_equal(getattr(again, f.name), getattr(spread, f.name))
    stored = spread.to_dict()
    assert all(part.dtype in (np.float32, bool) for part in stored.values() if isinstance(part, np.ndarray))
    certain = spread.among(9, np.arange(7))
    assert np.isfinite(Spread.from_dict(certain.to_dict(), d, 9).gene_information).all()


DAMAGES = {  # entry, change, what the error says
    "a number that is missing": ("axes", None, "axes"),
    "a direction that is missing": ("frames_1", None, "frames_1"),
    "another dimension": ("coefficients", lambda v: v[1:], r"coefficients has shape \(24, 3\), expected \(25, 3\)"),
    "numbers that are not finite": ("frames_0", lambda v: v * np.inf, "frames_0 is not finite"),
    "loadings of other genes": ("loadings", lambda v: v[:2], r"loadings has shape \(2, 3\), expected \(7, 3\)"),
    "a network that is no series": ("network", {"name": "siren"}, "the network of the spread is Siren.*, expected a Cosine"),
    "an unknown network": ("network", {"name": "perceptron"}, "'perceptron' is unknown"),
    "lengths that are not positive": ("lengths", lambda v: 0 * v, "are not all positive"),
    "no information": ("gene_information", lambda v: -v, "are not all positive"),
    "no size": ("scale", np.nan, "scale is nan, expected a positive number"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_spread_is_refused(name, change, words):
    stored = spread_of().to_dict()
    stored[name] = change(stored[name]) if callable(change) else change
    if change is None:
        del stored[name]
    with pytest.raises((KeyError, TypeError, ValueError), match=words):
        Spread.from_dict(stored, 2, 7)
