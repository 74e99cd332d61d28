import dataclasses

import numpy as np
import pytest
import torch

from neurst.core.nets import Fourier, LowRank, Siren, Spline
from neurst.core.samples import Box
from neurst.spatial import expression
from neurst.spatial.expression import ExpressionField, SideBySide, canonical

NETWORKS = {
    "siren": Siren(width=16, depth=2),
    "fourier": Fourier(width=16, depth=1, n_features=8),
    "lowrank": LowRank(rank=3, width=8),
    "spline": Spline(cells=(2, 4)),
}
GENES = np.array(["Mbp", "Snap25", "Gad1", "Pcp2", "Gfap", "Plp1", "Vip"])
EMPTY = 4  # a gene without counts
RANK = 3
SCALE = 70.0  # users' units per box unit
CENTER = [300.0, -20.0, 55.0]


def field_of(network, d, log_link):
    """A field that no fit made: random weights, more outputs than latents (as TGV has), any rotation, a target sum."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    net = SideBySide([network.build(d, RANK + 2, generator)], [RANK]).double().requires_grad_(False)
    for weight in net.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.double)
    loadings, intercept = np.linalg.qr(rng.standard_normal((7, RANK)))[0], rng.standard_normal(7)
    if log_link:
        loadings[EMPTY], intercept[EMPTY] = 0, -np.inf
    box = Box(torch.tensor(CENTER[:d], dtype=torch.double), SCALE)
    rotation, shift = rng.standard_normal((RANK, RANK)), rng.standard_normal(RANK)
    return ExpressionField(GENES, box, net, rotation, shift, loadings, intercept, log_link, 50.0 if log_link else 1.0)


WEIGHTS = np.array([0.5, 0.3, 0.2])


def members_of(network, d, log_link, n=3):
    """Networks, loadings and intercepts of fits that nothing made; of different ranks."""
    rng, nets, loadings, intercepts = np.random.default_rng(2), [], [], []
    for k in range(n):
        generator = torch.Generator().manual_seed(k)
        nets.append(network.build(d, RANK + 1, generator).double())
        loadings.append(rng.standard_normal((7, RANK - k % 2)))
        intercepts.append(rng.standard_normal(7))
        if log_link:
            loadings[k][EMPTY], intercepts[k][EMPTY] = 0, -np.inf
    return nets, loadings, intercepts


def averaged(members, weights, d, log_link):
    box = Box(torch.tensor(CENTER[:d], dtype=torch.double), SCALE)
    options = {"spots": points(d, 31), "log_link": log_link, "target_sum": 50.0 if log_link else 1.0}
    return ExpressionField.average(GENES, box, *members, weights, **options)


def average_of(network, d, log_link):
    """The average of three members."""
    return averaged(members_of(network, d, log_link), WEIGHTS, d, log_link)


def points(d, n=9):
    return np.random.default_rng(1).uniform(-1, 1, (n, d)) * SCALE + CENTER[:d]


def central(f, x, h):
    """Central differences of f along each axis of x (N, d), on a new last axis."""
    return np.stack([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(x.shape[1])], axis=-1)


def close(found, expected, rtol):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


each_link = pytest.mark.parametrize("log_link", [True, False], ids=["log", "identity"])
each_dimension = pytest.mark.parametrize("d", [2, 3])
each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


@each_link
@each_dimension
@each_network
def test_gradient_is_the_slope_of_the_field_in_users_units(network, d, log_link):
    field, x = field_of(network, d, log_link), points(d)
    close(field.gradient(x), central(field, x, SCALE * 1e-5), 1e-6)
    assert np.abs(field.gradient(x)).max() > 1e-4


@each_link
@each_dimension
@each_network
def test_hessian_is_the_second_difference_of_the_field_in_users_units(network, d, log_link):
    field, x = field_of(network, d, log_link), points(d)
    step = SCALE * 1e-3  # second differences: rounding over step^2
    close(field.hessian(x), central(lambda y: central(field, y, step), x, step), 1e-3)
    close(field.hessian(x), central(field.gradient, x, SCALE * 1e-5), 1e-5)


@each_link
@each_dimension
@pytest.mark.parametrize("genes", [GENES, ["Gad1", "Mbp"]], ids=["all", "two"])
def test_edge_is_the_norm_of_the_jacobian_of_the_predictor_over_genes(genes, d, log_link):
    field, x = field_of(NETWORKS["siren"], d, log_link).select(genes), points(d)
    with_counts = field.select([g for g in genes if not (log_link and g == GENES[EMPTY])])
    predictor = lambda y: np.log(with_counts(y)) if log_link else field(y)
    close(field.edge(x), np.linalg.norm(central(predictor, x, SCALE * 1e-5), axis=(1, 2)), 1e-6)


@each_link
def test_the_field_is_the_inverse_link_of_the_latents(log_link):
    field, x = field_of(NETWORKS["siren"], 2, log_link), points(2)
    z = field.net(torch.from_numpy((x - CENTER[:2]) / SCALE))[:, :RANK].numpy() @ field.rotation - field.shift
    eta = z @ field.loadings.T + field.intercept
    np.testing.assert_allclose(field.latent(x), z, rtol=1e-12)
    np.testing.assert_allclose(field(x), 50 * np.exp(eta) if log_link else eta, rtol=1e-12)


def test_a_gene_without_counts_is_expected_nowhere_and_flat():
    field, x = field_of(NETWORKS["siren"], 2, True), points(2)
    for read in (field, field.gradient, field.hessian):
        values = read(x)
        assert np.isfinite(values).all()
        assert not values[:, EMPTY].any()
    assert np.isfinite(field.edge(x)).all()


def test_select_keeps_the_order_asked_for_and_the_values():
    field, x = average_of(NETWORKS["siren"], 2, True), points(2)
    asked = ["Plp1", "Mbp", "Pcp2"]
    some = field.select(asked)
    assert list(some.genes) == asked
    for name in ("__call__", "gradient", "hessian", "std", "predictor_variance"):
        np.testing.assert_allclose(getattr(some, name)(x), getattr(field, name)(x)[:, [5, 0, 3]], rtol=1e-12)
    np.testing.assert_array_equal(some.latent(x), field.latent(x))


def test_select_refuses_unknown_genes():
    with pytest.raises(KeyError, match=r"\['Nope'\] are not in the field \(7 genes: Mbp, Snap25, Gad1"):
        field_of(NETWORKS["siren"], 2, True).select(["Mbp", "Nope"])


READS = ("__call__", "latent", "gradient", "hessian", "edge", "std", "predictor_variance")


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("chunk", [1, 4, 23])
def test_what_is_read_does_not_depend_on_the_chunk(read, chunk, monkeypatch):
    field, x = average_of(NETWORKS["siren"], 3, True), points(3, n=23)
    whole = getattr(field, read)(x)
    monkeypatch.setattr(expression, "CHUNK", chunk)
    np.testing.assert_allclose(getattr(field, read)(x), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("read", READS)
def test_what_is_read_does_not_depend_on_the_thread_count(read):
    field, x = average_of(Siren(width=64, depth=3), 2, True), points(2, n=999)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(getattr(field, read)(x))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5 * np.abs(found[0]).max())


@pytest.mark.parametrize("read", READS)
def test_no_points_give_no_rows(read):
    field = average_of(NETWORKS["siren"], 2, True)
    assert getattr(field, read)(np.empty((0, 2))).shape == (0, *getattr(field, read)(points(2)).shape[1:])


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 1), (2, 5, 2)])
def test_coordinates_of_another_shape_are_refused(shape):
    field = average_of(NETWORKS["siren"], 2, True)
    for read in READS:
        with pytest.raises(ValueError, match=r"`coords` has shape .*: expected \(N, 2\)"):
            getattr(field, read)(np.zeros(shape))


# ---- averages


def predictors(members, d, x):
    """(M, N, G) of fits, read one by one."""
    nets, loadings, intercepts = members
    inward = torch.from_numpy((x - CENTER[:d]) / SCALE)
    with torch.no_grad():
        latents = [net(inward).numpy()[:, : v.shape[1]] for net, v in zip(nets, loadings, strict=True)]
    return np.array([u @ v.T + b for u, v, b in zip(latents, loadings, intercepts, strict=True)])


@each_link
@each_dimension
@each_network
def test_an_average_is_the_weighted_mean_of_the_predictors_and_std_their_spread(network, d, log_link):
    members, x = members_of(network, d, log_link), points(d, 21)
    field, eta = averaged(members, 10 * WEIGHTS, d, log_link), predictors(members, d, x)
    np.testing.assert_allclose(field.members.weights, WEIGHTS)  # of sum 1, whatever the sum of those given
    mean = np.tensordot(WEIGHTS, eta, 1)
    expected = 50 * np.exp(mean) if log_link else mean
    np.testing.assert_allclose(field(x), expected, rtol=1e-9, atol=1e-9)
    known = np.delete(np.arange(7), EMPTY) if log_link else np.arange(7)
    spread = np.tensordot(WEIGHTS, (eta[..., known] - mean[:, known]) ** 2, 1) / (1 - (WEIGHTS**2).sum())
    np.testing.assert_allclose(field.predictor_variance(x)[:, known], spread, rtol=1e-8)
    s = np.sqrt(spread) * (expected[:, known] if log_link else 1)
    np.testing.assert_allclose(field.std(x)[:, known], s, rtol=1e-8)
    if log_link:
        assert not field.std(x)[:, EMPTY].any()


@each_link
def test_an_average_is_in_canonical_form_at_the_spots(log_link):
    field = average_of(NETWORKS["siren"], 2, log_link)
    z = field.latent(points(2, 31))
    r = 6 if log_link else 7  # 3 + 2 + 3 latents, but 7 genes, one of them without counts
    np.testing.assert_allclose(field.loadings.T @ field.loadings, np.eye(r), atol=1e-10)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-10)
    assert (np.diff(z.std(0)) <= 1e-10).all()


@each_link
def test_members_that_agree_have_no_spread(log_link):
    nets, loadings, intercepts = (3 * part for part in members_of(NETWORKS["siren"], 2, log_link, n=1))
    field, x = averaged((nets, loadings, intercepts), WEIGHTS, 2, log_link), points(2)
    np.testing.assert_allclose(field.std(x), 0, atol=1e-12)
    assert (average_of(NETWORKS["siren"], 2, log_link).predictor_variance(x)[:, 0] > 1e-3).all()


def test_the_spread_of_two_equal_members_is_that_of_a_sample_of_two():
    members = members_of(NETWORKS["siren"], 2, False, n=2)
    eta = predictors(members, 2, points(2))
    np.testing.assert_allclose(averaged(members, [1, 1], 2, False).std(points(2)), eta.std(0, ddof=1), rtol=1e-9)


def test_one_fit_is_a_field_without_members_or_spread():
    members, x = members_of(NETWORKS["siren"], 2, True, n=1), points(2)
    field = averaged(members, [0.3], 2, True)
    assert field.members is None
    np.testing.assert_allclose(field(x), 50 * np.exp(predictors(members, 2, x)[0]), rtol=1e-9)
    for read in (field.std, field.predictor_variance):
        with pytest.raises(
            ValueError, match="the field is a single fit, which has no spread: refit with `n_members=4` or"
        ):
            read(x)


LATENTS = {  # (N, r) and (G, r)
    "full rank": lambda rng: (rng.standard_normal((31, 4)) * [5, 1, 3, 0.2] + 7, rng.standard_normal((9, 4))),
    "a latent that vanished": lambda rng: (rng.standard_normal((31, 3)) * [2, 0, 1], rng.standard_normal((9, 3))),
    "a loading that vanished": lambda rng: (rng.standard_normal((31, 3)) + 1, rng.standard_normal((9, 3)) * [1, 1, 0]),
    "parallel loadings": lambda rng: (rng.standard_normal((31, 2)), np.outer(rng.standard_normal(9), [1, -2])),
    "nothing left": lambda rng: (np.full((31, 2), 3.0), rng.standard_normal((9, 2))),
    "as many genes as latents": lambda rng: (rng.standard_normal((31, 4)), rng.standard_normal((4, 4))),
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


RANKS = {  # size of each component, unit of the genes, rank that is held
    "far apart": ([1.0, 1e-3], 1.0, 2),
    "one next to nothing": ([1.0, 1e-5], 1.0, 1),
    "one next to nothing, but in a small unit": ([1.0, 1e-5], [1.0, 1e-5], 2),
    "one next to nothing in its unit": ([2.0, 1.0], [1.0, 1e5], 1),
    "the larger one next to nothing in its unit": ([1.0, 10.0], [1.0, 1e6], 1),
    "nothing at all": ([0.0, 0.0], 1.0, 1),
}


@pytest.mark.parametrize(("size", "unit", "rank"), RANKS.values(), ids=RANKS)
def test_components_next_to_nothing_are_left_out(size, unit, rank):
    latent = np.random.default_rng(5).standard_normal((31, 2))
    latent = np.linalg.qr(latent - latent.mean(0))[0]
    loadings = np.diag(size)  # of two genes, with a component each
    rotation, shift, turned, change = canonical(latent, loadings, unit if isinstance(unit, float) else np.array(unit))
    assert rotation.shape == (2, rank)
    assert turned.shape == (2, rank)
    error = (latent @ rotation - shift) @ turned.T + change - latent @ loadings.T
    assert np.abs(error / unit).max() < 1e-4 * np.abs(latent @ loadings.T / unit).max() + 1e-12


def test_the_canonical_form_does_not_depend_on_how_latents_and_loadings_share_their_axes():
    rng = np.random.default_rng(4)
    latent, loadings = LATENTS["full rank"](rng)
    mixing = rng.standard_normal((4, 4))
    here, there = canonical(latent, loadings), canonical(latent @ mixing, loadings @ np.linalg.inv(mixing).T)
    for a, b in zip(here[2:], there[2:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    np.testing.assert_allclose(latent @ here[0] - here[1], latent @ mixing @ there[0] - there[1], atol=1e-9)


def test_on_the_whole_field_edge_is_the_norm_of_the_latent_jacobian():
    field, x = field_of(NETWORKS["siren"], 2, False), points(2)
    latent_only = dataclasses.replace(field, loadings=np.eye(RANK), intercept=np.zeros(RANK), genes=GENES[:RANK])
    np.testing.assert_allclose(field.edge(x), latent_only.edge(x), rtol=1e-10)
    close(field.edge(x), np.linalg.norm(central(field.latent, x, SCALE * 1e-5), axis=(1, 2)), 1e-6)
