import dataclasses
import time
import tracemalloc

import numpy as np
import pytest
import torch
from heldout import NETWORKS, spread_of
from torch import nn

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


def box_of(d):
    return Box(torch.tensor(CENTER[:d], dtype=torch.double), SCALE)


def constant_of(link):
    """The predictor of each gene if position does not matter."""
    constant = np.linspace(-1, 1, 7)
    return np.where((np.arange(7) == EMPTY) & isinstance(link, LogLink), -np.inf, constant)


def averaged(network, members, weights, d, link, spread=None):
    given = {"constant": constant_of(link), "spots": points(d, 31), "link": link, "spread": spread}
    return ExpressionField.average(GENES, box_of(d), [network] * len(weights), *members, weights, **given)


def field_of(network=NETWORKS["siren"], d=2, link=LINKS["log"], n=3):
    """The average of a few members, with a spread if there are several."""
    spread = spread_of(d) if n > 1 else None
    return averaged(network, members_of(network, d, link, n), WEIGHTS[:n], d, link, spread)


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


@pytest.mark.parametrize(("network", "d", "link"), DERIVATIVES)
def test_latents_and_their_derivatives_are_read_at_once_and_give_the_gradient_of_some_genes(network, d, link):
    field, x = field_of(NETWORKS[network], d, LINKS[link]), points(d)
    latent, derivatives = field.latent_jacobian(x)
    np.testing.assert_allclose(latent, field.latent(x), rtol=1e-12, atol=1e-12)
    close(derivatives, central(field.latent, x, SCALE * 1e-5), 1e-6)
    close(field.gradient_of(latent, derivatives), field.jacobian(x), 1e-10)
    some = field.select(["Vip", "Mbp"])
    close(some.gradient_of(latent, derivatives), some.jacobian(x), 1e-10)
    np.testing.assert_array_equal(field.boundary_of(derivatives), field.boundary(x))


@each_link
@pytest.mark.parametrize("d", [2, 3])
def test_the_boundary_is_the_mean_square_of_slopes_in_units_of_the_spread_weighted_by_counts(d, link):
    members, x, log = members_of(NETWORKS["siren"], d, link), points(d), isinstance(link, LogLink)
    for v in members[1]:
        v[2] = 0  # a gene that is the same everywhere
    field = averaged(NETWORKS["siren"], members, WEIGHTS, d, link)
    predictor = lambda y: np.log(field(y)[:, FILLED]) if log else field(y)[:, FILLED]
    at_spots, slope = predictor(points(d, 31)), np.linalg.norm(central(predictor, x, SCALE * 1e-5), axis=2)
    for genes in (FILLED, np.array([0, 2, 3, 6]), np.array([5])):
        some = np.isin(FILLED, genes) & (FILLED != 2)
        weight = np.exp(at_spots.mean(0)) if log else np.ones(6)
        square = (slope / at_spots.std(0).clip(1e-12)) ** 2
        expected = np.sqrt(np.average(square[:, some], axis=1, weights=weight[some]))
        close(field.select(GENES[genes]).boundary(x), expected, 1e-6)
    assert not field.select(["Gad1"]).boundary(x).any()


@each_link
def test_neither_the_unit_of_the_coordinates_nor_that_of_the_values_changes_the_boundary(link):
    network, x, unit = NETWORKS["siren"], points(2), 137.0
    members = members_of(network, 2, link)
    field = averaged(network, members, WEIGHTS, 2, link)
    given = {"constant": constant_of(link), "spots": unit * points(2, 31), "link": link}
    box = Box(unit * box_of(2).center, unit * SCALE)
    larger = ExpressionField.average(GENES, box, [network] * 3, *members, WEIGHTS, **given)
    close(unit * larger.boundary(unit * x), field.boundary(x), 1e-9)  # per unit of the coordinates
    if isinstance(link, LogLink):  # another library size
        other = dataclasses.replace(field, link=LogLink(3000.0))
    else:  # another unit of each gene
        units = np.geomspace(0.01, 100, 7)
        nets, loadings, intercepts = members
        members = nets, [units[:, None] * v for v in loadings], [units * b for b in intercepts]
        given = {"constant": units * constant_of(link), "spots": points(2, 31), "link": link, "unit": units}
        other = ExpressionField.average(GENES, box_of(2), [network] * 3, *members, WEIGHTS, **given)
    close(other.boundary(x), field.boundary(x), 1e-9)


def edge(sharpness):
    """A network of two outputs: a step across the middle of the box, and a slope along the other axis."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    net[0].weight.data, net[0].bias.data = torch.tensor([[sharpness, 0.0], [0.0, 0.5]]), torch.zeros(2)
    return net.requires_grad_(False)


@each_link
def test_the_boundary_of_a_field_with_one_sharp_edge_is_largest_there(link):
    rng, grid = np.random.default_rng(0), np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 41)]), -1).reshape(-1, 2)
    x = grid * SCALE + CENTER[:2]
    given = {"constant": constant_of(link), "spots": x, "link": link}
    members = [edge(20.0)], [rng.standard_normal((7, 2))], [constant_of(link)]
    field = ExpressionField.average(GENES, box_of(2), [NETWORKS["siren"]], *members, [1.0], **given)
    boundary, away = field.boundary(x), np.abs(grid[:, 0])
    assert (away[boundary > 0.9 * boundary.max()] < 0.02).all()
    assert boundary[away < 0.02].min() > 5 * boundary[away > 0.2].max()


def test_a_gene_without_counts_is_expected_nowhere_and_flat():
    field, x = field_of(), points(2)
    for read in (field, field.jacobian, field.hessian, field.std):
        values = read(x)
        assert np.isfinite(values).all()
        assert not values[:, EMPTY].any()
    assert np.isfinite(field.boundary(x)).all()


SINGLE = ("std", "predictor_variance")  # computed in single precision
READS = ("__call__", "latent", "jacobian", "hessian", "boundary", *SINGLE)


def test_a_selection_has_the_order_asked_for_and_the_values_of_the_whole():
    field, x, asked = field_of(), points(2), ["Plp1", "Mbp", "Pcp2"]
    some = field.select(asked)
    assert list(some.genes) == asked
    for name in set(READS) - {"latent", "boundary"}:
        rtol = 1e-5 if name in SINGLE else 1e-12
        np.testing.assert_allclose(getattr(some, name)(x), getattr(field, name)(x)[:, [5, 0, 3]], rtol=rtol)
    np.testing.assert_array_equal(some.latent(x), field.latent(x))
    with pytest.raises(KeyError, match=r"\['Nope'\] are not in the field \(7 genes: Mbp, Snap25, Gad1"):
        field.select(["Mbp", "Nope"])


@pytest.mark.parametrize("read", READS)
def test_what_is_read_does_not_depend_on_chunks_threads_or_the_kind_of_array(read, monkeypatch):
    rtol = 1e-5 if read in SINGLE else 1e-9
    read, x = getattr(field_of(Siren(width=64, depth=2), 3), read), points(3, n=203)
    whole, before = read(x), torch.get_num_threads()
    close(read(torch.from_numpy(x)).numpy(), whole, 0)
    close(read(x.tolist()), whole, 0)
    try:
        torch.set_num_threads(2)
        close(read(x), whole, rtol)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(core_field, "POINTS_AT_ONCE", 50)
    close(read(x), whole, rtol)
    assert read(np.empty((0, 3))).shape == (0, *whole.shape[1:])
    with pytest.raises(ValueError, match=r"`coords` has shape .*: expected \(N, 3\)"):
        read(np.zeros((5, 2)))


# ---- averages


SHARES = {"of members alone": WEIGHTS, "with a constant": 0.7 * WEIGHTS, "of the constant nearly alone": 0.01 * WEIGHTS}


@pytest.mark.parametrize("weights", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize(("network", "d", "link"), [("siren", 2, "log"), ("spline", 3, "identity")])
def test_an_average_is_the_weighted_mean_of_the_predictors_and_of_the_constant(network, d, link, weights):
    network, link, log, x = NETWORKS[network], LINKS[link], link == "log", points(d, 21)
    members = members_of(network, d, link)
    field, eta = averaged(network, members, weights, d, link), predictors(members, d, x)
    mean = np.tensordot(weights, eta, 1) + ((1 - weights.sum()) * constant_of(link) if weights.sum() < 1 else 0)
    np.testing.assert_allclose(field(x), 50 * np.exp(mean) if log else mean, rtol=1e-9, atol=1e-9)
    spots = points(d, 31)
    z, rank = field.latent(spots), 6 if log else 7  # 3 + 2 + 3 latents, but 7 genes, one perhaps without counts
    np.testing.assert_allclose(field.loadings.T @ field.loadings, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-10)  # in canonical form at the spots
    np.testing.assert_allclose(z.std(0), field.latent_sd, rtol=1e-9)
    assert (np.diff(field.latent_sd) <= 1e-10).all()


def test_members_may_be_of_different_networks():
    kinds, link, x = [NETWORKS["siren"], NETWORKS["cosine"]], LINKS["log"], points(2)
    parts = [members_of(network, 2, link, n=1) for network in kinds]
    members = [[part[i][0] for part in parts] for i in range(3)]
    given = {"constant": constant_of(link), "spots": points(2, 31), "link": link}
    field = ExpressionField.average(GENES, box_of(2), kinds, *members, [0.6, 0.4], **given)
    expected = 50 * np.exp(np.tensordot([0.6, 0.4], predictors(members, 2, x), 1))
    again = ExpressionField.from_dict(field.to_dict())
    assert again.networks == tuple(kinds)
    for each in (field, again):
        np.testing.assert_allclose(each(x), expected, rtol=1e-6)


@each_link
def test_the_standard_deviation_is_that_of_the_spread_in_the_units_of_the_expression(link):
    field, x = field_of(link=link), points(2)
    variance = spread_of().predictor_variance(box_of(2).to_unit(torch.from_numpy(x)))
    np.testing.assert_allclose(field.predictor_variance(x), variance, rtol=1e-12)
    expected = np.sqrt(variance) * (field(x) if isinstance(link, LogLink) else 1)
    np.testing.assert_allclose(field.std(x), expected, rtol=1e-12)


def test_a_field_without_a_gaussian_process_has_no_standard_deviation():
    field, x = field_of(n=1), points(2)
    assert field.spread is None
    for read in (field.std, field.select(["Mbp"]).std, field.predictor_variance):
        with pytest.raises(ValueError, match="none of its members is a Gaussian process: refit with `penalty='auto'`"):
            read(x)


# ---- the canonical form


LATENTS = {  # (N, r) and (G, r)
    "full rank": lambda rng: (rng.standard_normal((31, 4)) * [5, 1, 3, 0.2] + 7, rng.standard_normal((9, 4))),
    "a latent that vanished": lambda rng: (rng.standard_normal((31, 3)) * [2, 0, 1], rng.standard_normal((9, 3))),
    "a loading that vanished": lambda rng: (rng.standard_normal((31, 3)) + 1, rng.standard_normal((9, 3)) * [1, 1, 0]),
    "nothing left": lambda rng: (np.full((31, 2), 3.0), rng.standard_normal((9, 2))),
    "one latent": lambda rng: (rng.standard_normal((5, 1)), rng.standard_normal((9, 1))),
}


def moments(latent):
    return latent.mean(0), np.cov(latent.T, bias=True).reshape(latent.shape[1], -1)


@pytest.mark.parametrize("make", LATENTS.values(), ids=LATENTS)
def test_the_canonical_form_is_the_same_predictor_in_standard_position(make):
    latent, loadings = make(np.random.default_rng(3))
    rotation, shift, turned, change = canonical(*moments(latent), loadings)
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
    rotation, shift, turned, change = canonical(*moments(latent), loadings, unit)
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
    assert (again.networks, again.link, again.target_sum) == (field.networks, field.link, field.target_sum)
    assert (again.spread is None) == (n == 1)


def damaged(**changes):
    """A stored field of three members with other entries; ``spread__variance`` is an entry of an entry, None takes an entry away."""
    stored = field_of().to_dict()
    for name, change in changes.items():
        *inside, name = name.split("__")
        part = stored
        for each in inside:
            part = part[each]
        part[name] = change(part[name]) if callable(change) else change
        if change is None:
            del part[name]
    return stored


FIRST = "weights__nets-0-0-linear-weight"
DAMAGES = {  # changes, and what the error says
    **{f"without {name}": ({name: None}, name) for name in field_of().to_dict() if name != "spread"},
    **{f"a spread without {name}": ({f"spread__{name}": None}, name) for name in spread_of().to_dict()},
    "fewer genes": ({"genes": lambda v: v[:3]}, r"loadings has shape \(7, 6\), expected \(3, 6\)"),
    "a loading that is not finite": ({"loadings": lambda v: v * np.nan}, "loadings is not finite"),
    "an infinite intercept": ({"intercept": np.abs}, "intercept is not finite"),
    "a rotation of too few outputs": ({"rotation": lambda v: v[1:]}, r"rotation has shape \(7, 6\), expected \(8, 6\)"),
    "an unknown link": ({"link": "square"}, r"link is 'square', expected one of \['identity', 'log'\]"),
    "no library": ({"target_sum": 0.0}, "target_sum is 0.0, expected a positive number"),
    "a box without a size": ({"box_scale": np.nan}, "box_scale is nan, expected a positive number"),
    "an unknown network": ({"networks__1__name": "perceptron"}, "the network 'perceptron' is unknown here"),
    "a network of another width": ({"networks__0__width": 17}, "weights are stored, but Siren"),
    "widths of too few members": ({"widths": lambda v: v[:2]}, r"widths has shape \(2,\), expected \(3,\)"),
    "a network too few": ({"networks__2": None}, "'2'"),
    "a width above the outputs": ({"widths": lambda v: v + 3}, "widths are .*, expected 1 to"),
    "a half width": ({"widths": lambda v: v / 2}, "expected whole numbers"),
    "a spread of fewer genes": (
        {"spread__loadings": lambda v: v[1:]},
        r"loadings has shape \(6, 3\), expected \(7, 3\)",
    ),
    "a spread that is not finite": ({"spread__variance": lambda v: v * np.nan}, "variance is not finite"),
    "a spread of another network": (
        {"spread__network": {"name": "spline", "cells": [2]}},
        "network of the spread .* expected a Cosine",
    ),
    "a spread of another series": (
        {"spread__network__waves": 9},
        r"coefficients has shape \(25, 3\), expected \(81, 3\)",
    ),
    "a spread of a series that would be huge": (
        {"spread__network__waves": 10**9},
        r"coefficients .* expected \(1000000000000000000, 3\)",
    ),
    "a spread without information": (
        {"spread__gene_information": lambda v: 0 * v},
        "gene_information, gene_unit and lengths are not all positive",
    ),
    "a spread without units": (
        {"spread__gene_unit": lambda v: -v},
        "gene_information, gene_unit and lengths are not all positive",
    ),
    "a spread without length": (
        {"spread__lengths": lambda v: -v},
        "gene_information, gene_unit and lengths are not all positive",
    ),
    "a spread without size": ({"spread__scale": 0.0}, "scale is 0.0, expected a positive number"),
    "a spread of other channels": ({"spread__channels": lambda v: v[:1]}, "channels|reshape"),
    "a spread of other directions": (
        {"spread__informed_1": lambda v: v[1:]},
        r"informed_1 has shape \(2, 3\), expected \(3, 3\)",
    ),
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
    "depth": {"networks__0__depth": 10**9},
    "number of outputs": {"n_outputs": lambda v: 0 * v + 10**9},
    "number of outputs beyond any whole number of a machine": {"n_outputs": [10**30] * 3},
    "cells": {"networks__0": {"name": "spline", "cells": [10**6]}},
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
