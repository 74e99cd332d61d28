import time
import tracemalloc

import numpy as np
import pytest
import torch
from heldout import NETWORKS

from neurst.core import field as core_field
from neurst.core.nets import NETWORKS as KNOWN_NETWORKS
from neurst.core.nets import Siren
from neurst.core.samples import Box
from neurst.spatial.field import ExpressionField, canonical
from neurst.spatial.observation import IdentityLink, LogLink

GENES = np.array(["Mbp", "Snap25", "Gad1", "Pcp2", "Gfap", "Plp1", "Vip"])
EMPTY = 4  # a gene without counts
FILLED = np.delete(np.arange(7), EMPTY)
RANK = 3
WEIGHTS = np.array([0.5, 0.3, 0.2])
SCALE = 70.0  # users' units per box unit
CENTER = [300.0, -20.0, 55.0]
LINKS = {"log": LogLink(50.0), "identity": IdentityLink()}
each_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)


def members_of(network, d, link, n=3):
    """Networks, loadings and intercepts of members that no fit made: of different ranks, with more outputs than latents, as TGV has."""
    rng, nets, loadings, intercepts = np.random.default_rng(2), [], [], []
    for k in range(n):
        generator = torch.Generator().manual_seed(k)
        net = network.build(d, RANK + 1, generator).requires_grad_(False)
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
        nets.append(net)
        loadings.append(rng.standard_normal((7, RANK - k % 2)))
        intercepts.append(rng.standard_normal(7))
        if isinstance(link, LogLink):
            loadings[k][EMPTY], intercepts[k][EMPTY] = 0, -np.inf
    return nets, loadings, intercepts


def averaged(network, members, weights, d, link):
    box = Box(torch.tensor(CENTER[:d], dtype=torch.double), SCALE)
    return ExpressionField.average(GENES, box, network, *members, weights, spots=points(d, 31), link=link)


def field_of(network=NETWORKS["siren"], d=2, link=LINKS["log"], n=3):
    """The average of a few members."""
    return averaged(network, members_of(network, d, link, n), WEIGHTS[:n], d, link)


def points(d, n=9):
    return np.random.default_rng(1).uniform(-1, 1, (n, d)) * SCALE + CENTER[:d]


def predictors(members, d, x):
    """(M, N, G) of members, read one by one."""
    inside = torch.from_numpy((x - CENTER[:d]) / SCALE)
    latents = [net.double()(inside).numpy()[:, : v.shape[1]] for net, v in zip(*members[:2], strict=True)]
    return np.array([u @ v.T + b for u, v, b in zip(latents, *members[1:], strict=True)])


def central(f, x, h):
    """Central differences of f along each axis of x (N, d), on a new last axis."""
    return np.stack([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(x.shape[1])], axis=-1)


def close(found, expected, rtol):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# ---- reading


DERIVATIVES = [("siren", 2, "log"), ("lowrank", 3, "identity"), ("spline", 2, "log")]


@pytest.mark.parametrize(("network", "d", "link"), DERIVATIVES)
def test_derivatives_are_central_differences_in_users_units(network, d, link):
    field, x, h = field_of(NETWORKS[network], d, LINKS[link]), points(d), SCALE * 1e-5
    close(field.jacobian(x), central(field, x, h), 1e-6)
    close(field.hessian(x), central(field.jacobian, x, h), 1e-5)
    assert min(np.abs(field.jacobian(x)).max(), np.abs(field.hessian(x)).max()) > 1e-4
    np.testing.assert_array_equal(field.gradient(x), field.jacobian(x))
    found, alphas = field.partials(x, 2)
    by_order = {0: field(x), 1: field.jacobian(x), 2: field.hessian(x)}
    for k, alpha in enumerate(alphas):
        axes = np.repeat(np.arange(d), alpha)
        close(found[..., k], by_order[len(axes)][(..., *axes)], 1e-9)
    assert len(set(alphas)) == len(alphas) == (d + 1) * (d + 2) // 2


@each_link
@pytest.mark.parametrize("d", [2, 3])
def test_the_boundary_is_the_norm_of_the_jacobian_of_the_predictor_over_genes(d, link):
    field, x, log = field_of(d=d, link=link), points(d), isinstance(link, LogLink)
    size = lambda f: np.linalg.norm(central(f, x, SCALE * 1e-5), axis=(1, 2))
    for genes in (GENES[FILLED], ["Gad1", "Mbp"]):
        some = field.select(genes)
        close(some.boundary(x), size(lambda y, some=some: np.log(some(y)) if log else some(y)), 1e-6)
    close(field.boundary(x), size(field.latent), 1e-6)  # on the whole field: the loadings are orthonormal


def test_a_gene_without_counts_is_expected_nowhere_and_flat():
    field, x = field_of(), points(2)
    for read in (field, field.jacobian, field.hessian, field.std):
        values = read(x)
        assert np.isfinite(values).all()
        assert not values[:, EMPTY].any()
    assert np.isfinite(field.boundary(x)).all()


READS = ("__call__", "latent", "jacobian", "hessian", "boundary", "std", "predictor_variance")


def test_a_selection_has_the_order_asked_for_and_the_values_of_the_whole():
    field, x, asked = field_of(), points(2), ["Plp1", "Mbp", "Pcp2"]
    some = field.select(asked)
    assert list(some.genes) == asked
    for name in set(READS) - {"latent", "boundary"}:
        np.testing.assert_allclose(getattr(some, name)(x), getattr(field, name)(x)[:, [5, 0, 3]], rtol=1e-12)
    np.testing.assert_array_equal(some.latent(x), field.latent(x))
    with pytest.raises(KeyError, match=r"\['Nope'\] are not in the field \(7 genes: Mbp, Snap25, Gad1"):
        field.select(["Mbp", "Nope"])


@pytest.mark.parametrize("read", READS)
def test_what_is_read_does_not_depend_on_chunks_threads_or_the_kind_of_array(read, monkeypatch):
    read, x = getattr(field_of(Siren(width=64, depth=2), 3), read), points(3, n=203)
    whole, before = read(x), torch.get_num_threads()
    close(read(torch.from_numpy(x)).numpy(), whole, 0)
    close(read(x.tolist()), whole, 0)
    try:
        torch.set_num_threads(2)
        close(read(x), whole, 1e-9)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(core_field, "POINTS_AT_ONCE", 50)
    close(read(x), whole, 1e-9)
    assert read(np.empty((0, 3))).shape == (0, *whole.shape[1:])
    with pytest.raises(ValueError, match=r"`coords` has shape .*: expected \(N, 3\)"):
        read(np.zeros((5, 2)))


# ---- averages


@pytest.mark.parametrize(("network", "d", "link"), [("siren", 2, "log"), ("spline", 3, "identity")])
def test_an_average_is_the_weighted_mean_of_the_predictors_and_std_their_spread(network, d, link):
    network, link, log, x = NETWORKS[network], LINKS[link], link == "log", points(d, 21)
    members = members_of(network, d, link)
    field, eta = averaged(network, members, 10 * WEIGHTS, d, link), predictors(members, d, x)
    np.testing.assert_allclose(field.members.weights, WEIGHTS)  # of sum 1, whatever the sum of those given
    mean, some = np.tensordot(WEIGHTS, eta, 1), FILLED if log else np.arange(7)
    expected = 50 * np.exp(mean) if log else mean
    np.testing.assert_allclose(field(x), expected, rtol=1e-9, atol=1e-9)
    spread = np.tensordot(WEIGHTS, (eta[..., some] - mean[:, some]) ** 2, 1) / (1 - (WEIGHTS**2).sum())
    np.testing.assert_allclose(field.predictor_variance(x)[:, some], spread, rtol=1e-8)
    np.testing.assert_allclose(field.std(x)[:, some], np.sqrt(spread) * (expected[:, some] if log else 1), rtol=1e-8)
    z, rank = field.latent(points(d, 31)), 6 if log else 7  # 3 + 2 + 3 latents, but 7 genes, one perhaps without counts
    np.testing.assert_allclose(field.loadings.T @ field.loadings, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-10)  # in canonical form at the spots
    assert (np.diff(z.std(0)) <= 1e-10).all()


def test_members_that_agree_have_no_spread_and_two_equal_ones_that_of_a_sample_of_two():
    network, link, x = NETWORKS["siren"], LINKS["identity"], points(2)
    same = [3 * part for part in members_of(network, 2, link, n=1)]
    np.testing.assert_allclose(averaged(network, same, WEIGHTS, 2, link).std(x), 0, atol=1e-12)
    two = members_of(network, 2, link, n=2)
    spread = predictors(two, 2, x).std(0, ddof=1)
    np.testing.assert_allclose(averaged(network, two, [1, 1], 2, link).std(x), spread, rtol=1e-9)
    assert (spread > 1e-3).all()


def test_one_fit_is_a_field_without_members_or_spread():
    members, x = members_of(NETWORKS["siren"], 2, LINKS["log"], n=1), points(2)
    field = averaged(NETWORKS["siren"], members, [0.3], 2, LINKS["log"])
    assert field.members is None
    np.testing.assert_allclose(field(x), 50 * np.exp(predictors(members, 2, x)[0]), rtol=1e-9)
    for read in (field.std, field.predictor_variance):
        with pytest.raises(ValueError, match="a single fit, which has no spread: refit with `n_members=4` or more"):
            read(x)


# ---- the canonical form


LATENTS = {  # (N, r) and (G, r)
    "full rank": lambda rng: (rng.standard_normal((31, 4)) * [5, 1, 3, 0.2] + 7, rng.standard_normal((9, 4))),
    "a latent that vanished": lambda rng: (rng.standard_normal((31, 3)) * [2, 0, 1], rng.standard_normal((9, 3))),
    "a loading that vanished": lambda rng: (rng.standard_normal((31, 3)) + 1, rng.standard_normal((9, 3)) * [1, 1, 0]),
    "nothing left": lambda rng: (np.full((31, 2), 3.0), rng.standard_normal((9, 2))),
    "one latent": lambda rng: (rng.standard_normal((5, 1)), rng.standard_normal((9, 1))),
}


@pytest.mark.parametrize("make", LATENTS.values(), ids=LATENTS)
def test_the_canonical_form_is_the_same_predictor_in_standard_position(make):
    latent, loadings = make(np.random.default_rng(3))
    rotation, shift, turned, change = canonical(latent, loadings)
    z = latent @ rotation - shift
    np.testing.assert_allclose(z @ turned.T + change, latent @ loadings.T, atol=1e-10)
    np.testing.assert_allclose(turned.T @ turned, np.eye(turned.shape[1]), atol=1e-10)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-10)
    spread = z.std(0)
    assert (np.diff(spread) <= 1e-10).all()
    np.testing.assert_allclose(z.T @ z / len(z), np.diag(spread**2), atol=1e-9)  # components are uncorrelated
    assert (turned[np.abs(turned).argmax(0), np.arange(turned.shape[1])] > 0).all()


RANKS = {  # size of each component, unit of the genes, components that remain
    "one next to nothing": ([1.0, 1e-5], 1.0, 1),
    "one next to nothing, but in a small unit": ([1.0, 1e-5], np.array([1.0, 1e-5]), 2),
    "the larger one next to nothing in its unit": ([1.0, 10.0], np.array([1.0, 1e6]), 1),
    "nothing at all": ([0.0, 0.0], 1.0, 1),
}


@pytest.mark.parametrize(("size", "unit", "rank"), RANKS.values(), ids=RANKS)
def test_components_next_to_nothing_are_dropped(size, unit, rank):
    latent = np.random.default_rng(5).standard_normal((31, 2))
    latent = np.linalg.qr(latent - latent.mean(0))[0]
    loadings = np.diag(size)  # of two genes, with a component each
    rotation, shift, turned, change = canonical(latent, loadings, unit)
    assert rotation.shape == turned.shape == (2, rank)
    error = (latent @ rotation - shift) @ turned.T + change - latent @ loadings.T
    assert np.abs(error / unit).max() < 1e-4 * np.abs(latent @ loadings.T / unit).max() + 1e-12


# ---- storing


@pytest.mark.parametrize(("network", "d", "link", "n"), [("siren", 2, "log", 3), ("spline", 3, "identity", 1)])
def test_a_stored_field_is_read_back_bit_by_bit(network, d, link, n):
    field, x = field_of(NETWORKS[network], d, LINKS[link], n), points(d)
    again = ExpressionField.from_dict(field.to_dict())
    for name in READS if n > 1 else READS[:5]:
        np.testing.assert_array_equal(getattr(again, name)(x), getattr(field, name)(x))
    assert list(again.genes) == list(GENES)
    assert (again.network, again.link, again.target_sum) == (field.network, field.link, field.target_sum)
    assert (again.members is None) == (n == 1)


def damaged(**changes):
    """A stored field of three members with other entries; ``members__weights`` is an entry of an entry, None takes an entry away."""
    stored = field_of().to_dict()
    for name, change in changes.items():
        inside, _, name = name.rpartition("__")
        part = stored[inside] if inside else stored
        part[name] = change(part[name]) if callable(change) else change
        if change is None:
            del part[name]
    return stored


FIRST = "weights__nets-0-0-linear-weight"
DAMAGES = {  # changes, and what the error says
    **{f"without {name}": ({name: None}, name.replace("members", "weights")) for name in field_of().to_dict()},
    "fewer genes": ({"genes": lambda v: v[:3]}, r"loadings has shape \(7, 6\), expected \(3, 6\)"),
    "a loading that is not finite": ({"loadings": lambda v: v * np.nan}, "loadings is not finite"),
    "an infinite intercept": ({"intercept": np.abs}, "intercept is not finite"),
    "a rotation of too few outputs": ({"rotation": lambda v: v[1:]}, r"rotation has shape \(7, 6\), expected \(8, 6\)"),
    "an unknown link": ({"link": "square"}, r"link is 'square', expected one of \['identity', 'log'\]"),
    "no library": ({"target_sum": 0.0}, "target_sum is 0.0, expected a positive number"),
    "a box without a size": ({"box_scale": np.nan}, "box_scale is nan, expected a positive number"),
    "an unknown network": ({"network__name": "perceptron"}, "the network 'perceptron' is unknown here"),
    "a network of another width": ({"network__width": 17}, "weights are stored, but Siren"),
    "widths of too few members": ({"widths": lambda v: v[:2]}, r"widths has shape \(2,\), expected \(3,\)"),
    "members that are not there": ({"members": {}}, "weights"),
    "loadings of members that are not finite": ({"members__loadings": lambda v: v * np.nan}, "loadings is not finite"),
    "one member with all the weight": (
        {"members__weights": np.array([1.0, 0.0, 0.0])},
        "expected shares that sum to 1",
    ),
    "weights of members above one": ({"members__weights": lambda v: 2 * v}, "expected shares that sum to 1"),
    "a weight below zero": ({"members__weights": np.array([1.5, -0.3, -0.2])}, "expected shares that sum to 1"),
    "intercepts by member": ({"members__intercepts": lambda v: v.T}, r"intercepts has shape \(3, 7\)"),
    "a weight that is not finite": ({FIRST: lambda v: v * np.nan}, "linear.weight is not finite"),
    "weights of an unknown network": ({"weights__nets-7-bias": np.zeros(3)}, "belong to none of the 3 networks"),
    "a weight too few": ({FIRST: None}, "weights are stored, but Siren"),
    "a weight under another name": ({FIRST: None, "weights__nets-0-weight": np.zeros((16, 2))}, "linear"),
}


@pytest.mark.parametrize(("changes", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_field_is_refused(changes, words):
    stored = damaged(**changes)
    with pytest.raises((KeyError, TypeError, ValueError), match=words):
        ExpressionField.from_dict(stored)


HOSTILE = {
    "depth": {"network__depth": 10**9},
    "number of outputs": {"n_outputs": lambda v: 0 * v + 10**9},
    "number of outputs beyond any whole number of a machine": {"n_outputs": [10**30] * 3},
    "cells": {"network": {"name": "spline", "cells": [10**6]}},
    "number of axes": {"box_center": np.zeros(10**6)},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_stored_field_that_claims_to_be_huge_is_refused_before_anything_is_built(changes, monkeypatch):
    def build(*_):
        msg = "a network was built"
        raise AssertionError(msg)

    stored = damaged(**changes)
    for network in KNOWN_NETWORKS.values():
        monkeypatch.setattr(network, "build", build)
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises((KeyError, TypeError, ValueError), match="expected|has [0-9,]{9,}"):
            ExpressionField.from_dict(stored)
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 5
