import math

import pytest
import torch
import torch.nn.functional as F
from draws import normal, uniform

from neurst.core.check import is_homogeneous, vanishes_on_constants
from neurst.core.jet import Jet, derivative, seed
from neurst.core.nets import NETWORKS, Fourier, LowRank, Siren, Spline
from neurst.core.penalty import (
    PENALTIES,
    TGV,
    AnisotropicTV,
    DirectionalTV,
    EdgeWeightedTV,
    Eikonal,
    HessianTV,
    HigherOrderTV,
    IsotropicTV,
    MixedTV,
    NuclearTV,
    SpaceVariantTV,
    VectorialTV,
    WeightedTV,
    _frames,
    as_penalty,
    score,
)

N, C = 7, 3
ALONG, WEIGHT = normal(4, 2, seed=1), uniform(N, seed=2, low=0.1, high=2.0)
ROTATION = torch.linalg.qr(normal(3, 3)).Q


def siren(d=2, c=C, seed=0):
    return Siren(width=7, depth=2).build(d, c, torch.Generator().manual_seed(seed)).double()


CASES = {
    **{name: cls() for name, cls in PENALTIES.items()},
    "third_order": HigherOrderTV(3),
    "directional": DirectionalTV(ALONG),
    "directional, varying": DirectionalTV(normal(3, N, 2), WEIGHT),
    "directional, metric": DirectionalTV(ALONG, metric=normal(C, C)),
    "space_variant, shared": SpaceVariantTV(shared=True),
    "space_variant, shared, no refresh yet": SpaceVariantTV(shared=True),
    "weighted": WeightedTV(WEIGHT),
    "space_variant, no refresh yet": SpaceVariantTV(),
    "edge_weighted, no refresh yet": EdgeWeightedTV(),
}


def penalty_and_jet(name):
    """A penalty bound to points, its weights from another field, and the jet of a random field there."""
    x, case = uniform(N, 2), CASES[name]
    penalty = (case if "no refresh" in name else case.refreshed(siren(seed=3), uniform(40, 2, seed=4))).at(x)
    return penalty, siren(c=penalty.channels(C, 2))(seed(x, penalty.directions(x), penalty.order))


@pytest.mark.parametrize("name", CASES)
def test_a_penalty_is_homogeneous_of_degree_one(name):
    penalty, jet = penalty_and_jet(name)
    assert penalty(jet) > 0
    is_homogeneous(penalty, jet)


@pytest.mark.parametrize("name", CASES)
def test_a_constant_field_costs_nothing_and_its_gradient_is_zero(name):
    penalty, jet = penalty_and_jet(name)
    # the second field of TGV is a slope: a constant f has w = 0
    constant = (torch.arange(jet.shape[1]) < C).double()
    vanishes_on_constants(lambda f: penalty(Jet(f.value * constant, f.terms)), jet)


# on the plane f(x) = A x + b
SLOPE = normal(C, 3, seed=5)


def planes(x):
    return F.linear(x, SLOPE, normal(C))


def planes_with(w):
    """f = A x + b and a second field w (C, 3), constant."""
    return lambda x: F.linear(
        x, torch.cat([SLOPE, torch.zeros(3 * C, 3).double()]), torch.cat([normal(C), w.flatten()])
    )


ON_PLANES = {
    "isotropic": (IsotropicTV(), planes, SLOPE.norm(dim=1).sum()),
    "anisotropic": (AnisotropicTV(), planes, SLOPE.abs().sum()),
    "vectorial": (VectorialTV(), planes, SLOPE.norm()),
    "nuclear": (NuclearTV(), planes, torch.linalg.svdvals(SLOPE).sum()),
    "directional": (DirectionalTV(ROTATION[:2]), planes, (SLOPE @ ROTATION[:2].T).abs().sum()),
    "weighted": (WeightedTV(WEIGHT), planes, WEIGHT.mean() * SLOPE.norm(dim=1).sum()),
    "directional, weighted": (
        DirectionalTV(ROTATION, WEIGHT),
        planes,
        WEIGHT.mean() * (SLOPE @ ROTATION.T).abs().sum(),
    ),
    "second_order": (HigherOrderTV(), planes, 0.0),
    "hessian": (HessianTV(), planes, 0.0),
    "mixed": (MixedTV(), planes, 0.1 * SLOPE[:, :2].abs().sum()),
    "mixed, other share": (MixedTV(first_order=2.0), planes, 2.0 * SLOPE[:, :2].abs().sum()),
    "tgv, w = 0": (TGV(a1=2.0), planes_with(torch.zeros(C, 3).double()), 2.0 * SLOPE.norm(dim=1).sum()),
    "tgv, w = grad f": (TGV(), planes_with(SLOPE), 0.0),
    "tgv, w = -grad f": (TGV(), planes_with(-SLOPE), 2.0 * SLOPE.norm(dim=1).sum()),
}


@pytest.mark.parametrize("name", ON_PLANES)
def test_a_plane_costs_the_norm_of_its_slope(name):
    penalty, field, expected = ON_PLANES[name]
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(score(penalty, field, uniform(N, 3)), expected, rtol=1e-9, atol=1e-12)


# on f_c(x) = x' A_c x / 2, whose Hessian is A_c
def symmetric(d):
    a = normal(2, d, d, seed=6)
    return a + a.mT


def quadratics(a):
    return lambda x: torch.cat([torch.unsqueeze(torch.sum(x * F.linear(x, part), -1), -1) * 0.5 for part in a], -1)


def quadratics_with_gradient(a):
    """f and w = grad f = A x, channel-major."""
    return lambda x: torch.cat([quadratics(a)(x), F.linear(x, a.flatten(0, 1))], -1)


def with_second_field(field, matrix):
    """f = `field` with w = M x."""
    return lambda x: torch.cat([field(x), F.linear(x, matrix)], -1)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_quadratic_costs_the_norm_of_its_hessian(d):
    a, x = symmetric(d), uniform(N, d)
    frobenius = a.norm(dim=(1, 2)).sum()
    for penalty, field, expected in [
        (HessianTV(), quadratics(a), frobenius),
        (HigherOrderTV(2), quadratics(a), a.diagonal(dim1=1, dim2=2).abs().sum()),
        (HigherOrderTV(3), quadratics(a), 0.0 * frobenius),
        (TGV(a0=0.3), quadratics_with_gradient(a), 0.3 * frobenius),
    ]:
        torch.testing.assert_close(score(penalty, field, x), expected, rtol=1e-9, atol=1e-9)


def test_a_rotation_as_second_field_bends_nothing():
    # sym_grad of w = M x is the symmetric part of M
    x, spin, stretch = (
        uniform(N, 2),
        torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(),
        torch.tensor([[1.0, 2.0], [2.0, -1.0]]).double(),
    )
    flat = lambda u: u[..., :1] * 0.0
    for matrix in (spin, stretch, spin + stretch):
        slope = F.linear(x, matrix).norm(dim=1).mean()
        bend = torch.linalg.matrix_norm((matrix + matrix.T) / 2)
        torch.testing.assert_close(
            score(TGV(a1=1.5, a0=0.4), with_second_field(flat, matrix), x), 1.5 * slope + 0.4 * bend
        )


MONOMIALS = {
    # f(x, y, z) and its |D_x D_z f| + |D_y D_z f| at points
    "x z": (lambda x, y, z: x * z, lambda x, y, z: torch.ones_like(x)),
    "x y": (lambda x, y, z: x * y, lambda x, y, z: torch.zeros_like(x)),
    "z^2": (lambda x, y, z: z * z, lambda x, y, z: torch.zeros_like(x)),
    "x^2 z + y z^2": (lambda x, y, z: x * x * z + y * z * z, lambda x, y, z: 2 * x.abs() + 2 * z.abs()),
    "x y z": (lambda x, y, z: x * y * z, lambda x, y, z: y.abs() + x.abs()),
}


@pytest.mark.parametrize("name", MONOMIALS)
def test_the_mixed_penalty_of_a_polynomial_in_three_dimensions_is_known(name):
    f, expected = MONOMIALS[name]
    x = uniform(N, 3)
    found = score(MixedTV(first_order=0.0), lambda u: f(u[..., :1], u[..., 1:2], u[..., 2:]), x)
    torch.testing.assert_close(found, expected(*x.T).mean())


def test_the_mixed_penalty_takes_every_spatial_axis_against_the_last():
    a, x = symmetric(3), uniform(N, 3)
    first = F.linear(x, a[:, :2].flatten(0, 1)).abs().sum(1).mean()
    expected = a[:, :2, 2].abs().sum() + 0.1 * first
    torch.testing.assert_close(score(MixedTV(), quadratics(a), x), expected)


def test_a_derivative_of_third_order_of_a_cube_is_six():
    torch.testing.assert_close(score(HigherOrderTV(3), lambda x: x**3, uniform(N, 1)), torch.tensor(6.0).double())


@pytest.mark.parametrize("steepness", [1.0, 5.0, 50.0])
def test_tv_of_a_step_is_its_rise_over_the_length_however_steep(steepness):
    n, length, height = 4001, 2.0, 3.0
    x = ((torch.arange(n).double() + 0.5) / n * length - length / 2)[:, None]
    step = lambda u: torch.tanh(u * steepness) * (height / 2 / math.tanh(steepness))
    for name in ("isotropic", "anisotropic", "vectorial", "nuclear"):
        found = score(as_penalty(name), step, x)
        torch.testing.assert_close(found, torch.tensor(height / length).double(), rtol=1e-4, atol=0.0)


def rotated(field, q):
    return lambda x: field(F.linear(x, q))


def turn_second_field(field, q):
    """TGV's outputs of a rotated field: f(Qx) and Q' w(Qx)."""
    d = len(q)
    turn = torch.block_diag(torch.eye(C).double(), *[q.T] * C)
    assert len(turn) == C * (1 + d)
    return lambda x: F.linear(field(F.linear(x, q)), turn)


@pytest.mark.parametrize(
    "name", ["isotropic", "vectorial", "nuclear", "hessian", "tgv", "edge_weighted", "space_variant"]
)
@pytest.mark.parametrize("d", [2, 3])
def test_a_rotated_field_costs_the_same(name, d):
    q = torch.linalg.qr(normal(d, d, seed=7)).Q
    penalty, x, anchors = PENALTIES[name](), uniform(N, d), uniform(40, d, seed=4)
    field = siren(d, penalty.channels(C, d))
    there = turn_second_field(field, q) if name == "tgv" else rotated(field, q)
    expected = score(penalty.refreshed(field, anchors), field, x)
    torch.testing.assert_close(score(penalty.refreshed(there, anchors @ q), there, x @ q), expected)
    other = score(AnisotropicTV(), there, x @ q)  # the law can fail
    assert not torch.isclose(other, score(AnisotropicTV(), field, x), rtol=1e-3)


# ---- total nuclear variation


def jets(*shape, seed=0):
    """A jet of no field, of random first derivatives (d, N, C)."""
    terms = normal(*shape, seed=seed)
    return Jet(torch.zeros_like(terms[0]), terms[None])


NUCLEAR = [(1, N, 3), (2, N, 1), (2, N, 2), (2, N, 5), (3, N, 2), (3, N, 3), (3, N, 20)]  # (d, N, C)


@pytest.mark.parametrize("shape", NUCLEAR, ids=str)
def test_the_nuclear_penalty_is_the_mean_sum_of_singular_values(shape):
    jet = jets(*shape)
    expected = torch.linalg.svdvals(jet.derivative(1).permute(1, 2, 0)).sum(-1).mean()
    torch.testing.assert_close(NuclearTV()(jet), expected)


@pytest.mark.parametrize("shape", NUCLEAR, ids=str)
def test_the_slope_of_the_nuclear_penalty_is_that_of_the_singular_values(shape):
    terms = jets(*shape).terms.clone().requires_grad_()
    if shape[0] <= shape[2]:  # else a singular value is zero for good
        torch.autograd.gradcheck(lambda t: NuclearTV()(Jet(torch.zeros_like(t[0, 0]), t)), terms)
    (found,) = torch.autograd.grad(NuclearTV()(Jet(torch.zeros_like(terms[0, 0]), terms)), terms)
    u, _, vh = torch.linalg.svd(terms.detach()[0].permute(1, 2, 0), full_matrices=False)
    torch.testing.assert_close(found[0], (u @ vh).permute(2, 0, 1) / N)  # its subgradient of least norm


@pytest.mark.parametrize("shape", NUCLEAR, ids=str)
def test_frames_of_coordinates_and_channels_do_not_matter_to_the_nuclear_penalty(shape):
    d, _, c = shape
    jet, q, p = jets(*shape), torch.linalg.qr(normal(d, d, seed=1)).Q, torch.linalg.qr(normal(c, c, seed=2)).Q
    turned = Jet(jet.value, torch.einsum("kinc,ij,ce->kjne", jet.terms, q, p))
    torch.testing.assert_close(NuclearTV()(turned), NuclearTV()(jet))
    if d > 1 and c > 1:  # the law can fail
        assert not torch.isclose(IsotropicTV()(turned), IsotropicTV()(jet), rtol=1e-3)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_where_channels_share_a_direction_the_nuclear_penalty_is_the_vectorial_one(d):
    shared = torch.einsum("in,nc->inc", normal(d, N, seed=1), normal(N, 4, seed=2))
    jet = Jet(torch.zeros_like(shared[0]), shared[None])
    torch.testing.assert_close(NuclearTV()(jet), VectorialTV()(jet))
    other = jets(d, N, 4)
    nuclear, vectorial = NuclearTV()(other), VectorialTV()(other)
    if d > 1:  # elsewhere it is larger, but not by more than the rank allows
        assert 1.05 * vectorial < nuclear < d**0.5 * vectorial


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_jacobian_is_singular_the_slope_of_the_nuclear_penalty_is_finite(dtype):
    terms = torch.zeros(1, 2, 4, 3, dtype=dtype)
    terms[0, 0, 1] = 1.0  # rank one
    terms[0, :, 2] = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])  # rank one, in no frame of its own
    terms[0, :, 3] = 1e-30 * torch.tensor([[1.0, 2.0, 3.0], [3.0, -1.0, 0.5]])  # next to nothing
    terms.requires_grad_()
    (slope,) = torch.autograd.grad(NuclearTV()(Jet(torch.zeros_like(terms[0, 0]), terms)), terms)
    assert slope.isfinite().all()
    assert not slope[:, :, 0].any()
    torch.testing.assert_close(slope[0, 0, 1], torch.full((3,), 3**-0.5 / 4, dtype=dtype))
    assert slope.flatten(2).norm(dim=1).max() < 1  # of a norm: bounded


def test_directions_say_which_way_variation_costs():
    phi = 0.7
    across = torch.tensor([math.cos(phi), math.sin(phi)]).double()
    along = torch.tensor([-math.sin(phi), math.cos(phi)]).double()
    edge, x = lambda u: torch.tanh(F.linear(u, 5 * across[None])), uniform(N, 2)
    torch.testing.assert_close(score(DirectionalTV(along[None]), edge, x), torch.tensor(0.0).double())
    torch.testing.assert_close(score(DirectionalTV(across[None]), edge, x), score(IsotropicTV(), edge, x))


PHI = 0.9
NORMAL = torch.tensor([math.cos(PHI), math.sin(PHI)]).double()


def slanted_edge(x):
    """A step across NORMAL through the origin, upward in one channel and downward in another, with a faint ramp along it."""
    step = torch.tanh(F.linear(x, 8 * NORMAL[None]))
    ramp = F.linear(x, 0.05 * torch.stack([-NORMAL[1:], NORMAL[:1]], 1))
    return torch.cat([step + ramp, ramp - step * 2.0], -1)


@pytest.mark.parametrize(
    "anchors", [uniform(1500, 2, seed=8), uniform(1500, 2, seed=9) * torch.tensor([1.0, 0.4])], ids=["even", "uneven"]
)
def test_a_space_variant_direction_across_an_edge_is_its_normal(anchors):
    x = uniform(9, 1, low=-0.4, high=0.4) * torch.tensor([-NORMAL[1], NORMAL[0]])  # on the edge
    bound = SpaceVariantTV().refreshed(slanted_edge, anchors).at(x)
    *along, across = bound.along  # (N, 2)
    cosine = lambda v: (F.normalize(v, dim=-1) @ NORMAL).abs()
    assert cosine(across).min() > 0.999
    assert cosine(along[0]).max() < 0.05
    # less shrinkage across the edge than along it
    assert (across.norm(dim=-1) < 0.5 * along[0].norm(dim=-1)).all()
    torch.testing.assert_close(across.norm(dim=-1) + along[0].norm(dim=-1), torch.full((9,), 2.0).double())


def test_a_field_that_varies_in_one_direction_only_is_not_shrunk_there():
    # with one neighbour T is that of one gradient: nothing along the edge, a = 0
    f, anchors = siren(c=1), uniform(50, 2)
    assert SpaceVariantTV(neighbours=1).refreshed(f, anchors).at(anchors).along[1].norm() < 1e-6


@pytest.mark.parametrize(
    ("slopes", "stretches"), [([2.0, 1.0], [0.5, 1.5]), ([3.0, 2.0, 1.0], [0.5, 1.5, 1.5]), ([2.0], [1.0])]
)
def test_one_direction_is_across_the_edges_and_the_others_along_them(slopes, stretches):
    # f_i = s_i x_i: across is axis 0, a = mean(s_1, ..) / s_0 and b = 2 - a
    d = len(slopes)
    plane = lambda x: F.linear(x, torch.diag(torch.tensor(slopes).double()))
    anchors = uniform(50, d)
    along = SpaceVariantTV().refreshed(plane, anchors).at(anchors[:4]).along
    expected = torch.diag(torch.tensor(stretches).double()).flip(0)
    torch.testing.assert_close(along.abs(), expected[:, None].expand(d, 4, d))


@pytest.mark.parametrize("penalty", [SpaceVariantTV(), EdgeWeightedTV(), EdgeWeightedTV(neighbours=1)], ids=repr)
def test_weights_have_mean_one_and_are_low_at_edges(penalty):
    anchors = uniform(1500, 2, seed=8)
    bound = penalty.refreshed(slanted_edge, anchors)
    torch.testing.assert_close(bound.at(anchors).weight.mean(), torch.tensor(1.0).double())
    at_edge, off = bound.at(0.01 * uniform(5, 2)).weight, bound.at(0.6 * NORMAL + 0.01 * uniform(5, 2)).weight
    assert at_edge.max() < 0.3 * off.min()
    # w = c / (m + mean m): in flat parts m is nearly 0, so the ratio is 1 + m / mean m
    assert off.max() < 3


@pytest.mark.parametrize("penalty", [SpaceVariantTV(neighbours=100), EdgeWeightedTV(neighbours=1000)], ids=repr)
def test_weights_averaged_over_all_points_are_one(penalty):
    weight = penalty.refreshed(slanted_edge, uniform(100, 2)).at(uniform(N, 2)).weight
    torch.testing.assert_close(weight, torch.ones(N).double())


@pytest.mark.parametrize("penalty", [SpaceVariantTV(), EdgeWeightedTV()], ids=repr)
def test_weights_carry_no_unit(penalty):
    anchors, x = uniform(100, 2), uniform(N, 2)
    weight = lambda factor: penalty.refreshed(lambda u: slanted_edge(u) * factor, anchors).at(x).weight
    torch.testing.assert_close(weight(1e-6), weight(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("penalty", "plain"), [(SpaceVariantTV(), AnisotropicTV()), (EdgeWeightedTV(), IsotropicTV())], ids=repr
)
def test_a_field_without_gradient_leaves_the_plain_penalty(penalty, plain, dtype):
    constant, x, anchors = lambda u: u[..., :1] * 0.0, uniform(N, 2).to(dtype), uniform(3000, 2).to(dtype)
    field = siren().to(dtype)
    torch.testing.assert_close(score(penalty.refreshed(constant, anchors), field, x), score(plain, field, x))
    torch.testing.assert_close(score(penalty, field, x), score(plain, field, x))  # nor before the first refresh


@pytest.mark.parametrize("penalty", [SpaceVariantTV(), EdgeWeightedTV()], ids=repr)
def test_a_field_without_gradient_in_one_half_makes_no_nan(penalty):
    half, x = lambda u: torch.relu(u[..., :1]), uniform(50, 2)
    net = siren()
    bound = penalty.refreshed(half, uniform(200, 2, seed=8))
    score(bound, net, x).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    weight = bound.at(x).weight
    assert weight.isfinite().all()
    assert weight[x[:, 0] < -0.3].min() > weight[x[:, 0] > 0.3].max()


@pytest.mark.parametrize("penalty", [SpaceVariantTV(), EdgeWeightedTV()], ids=repr)
def test_weights_are_frozen(penalty):
    net = siren()
    bound = penalty.refreshed(net, uniform(40, 2)).at(uniform(N, 2))
    assert not bound.weight.requires_grad
    with pytest.raises(TypeError, match=r"differs from point to point: use score\(penalty, field, x\)"):
        penalty(net(seed(uniform(N, 2))))


SMALL = {
    "siren": Siren(width=6, depth=2),
    "fourier": Fourier(width=6, depth=1, n_features=3),
    "lowrank": LowRank(rank=3, width=5),
    "spline": Spline(cells=(2, 5)),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_every_penalty_of_every_network_has_finite_gradients(network, name, d):
    penalty = PENALTIES[name]()
    net = SMALL[network].build(d, penalty.channels(2, d), torch.Generator().manual_seed(0))
    x = uniform(9, d).float()
    for current in (penalty, penalty.refreshed(net, uniform(30, d).float())):
        cost = score(current, net, x)
        assert cost.shape == ()
        cost.backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert grads
        assert all(g.isfinite().all() for g in grads)


def test_a_penalty_is_a_mean_over_points():
    x, penalty = uniform(N, 2), IsotropicTV()
    torch.testing.assert_close(score(penalty, siren(), x.repeat(3, 1)), score(penalty, siren(), x))
    gradient = derivative(siren(), x, torch.eye(2).double(), 1)
    torch.testing.assert_close(score(penalty, siren(), x), gradient.square().sum(0).sqrt().sum(1).mean())


def test_an_unknown_penalty_is_told_the_known_ones():
    assert as_penalty("tgv") == TGV()
    assert as_penalty(own := HigherOrderTV(3)) is own
    with pytest.raises(
        ValueError, match=r"`penalty='tv'` is unknown: choose one of \['anisotropic',.*or pass a Penalty"
    ):
        as_penalty("tv")


@pytest.mark.parametrize("order", [0, 1.5])
def test_an_order_is_a_whole_number(order):
    with pytest.raises(ValueError, match=rf"HigherOrderTV\(order={order}\)`: expected a whole number"):
        HigherOrderTV(order)


def test_frames_of_the_channels_do_not_matter_to_shared_space_variant_tv():
    field, x = siren(), uniform(40, 2, seed=4)
    turned = lambda u: F.linear(field(u), ROTATION)
    costs = [score(SpaceVariantTV(shared=True).refreshed(f, x), f, x) for f in (field, turned)]
    torch.testing.assert_close(*costs)


def test_channels_that_all_vary_alike_leave_the_vectorial_weighting():
    x, one = uniform(40, 2, seed=4), siren(c=1)
    alike = lambda u: F.linear(one(u), torch.ones(3, 1, dtype=torch.float64))
    shared, single = (SpaceVariantTV(shared=True).refreshed(f, x) for f in (alike, one))
    torch.testing.assert_close(score(shared, alike, x), 3**0.5 * score(single, one, x))


def test_a_combination_of_channels_that_varies_little_costs_more_for_each_unit_of_its_slope():
    slopes = torch.tensor([[1.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    field, x = lambda u: F.linear(u, slopes), uniform(40, 2, seed=4)
    metric = SpaceVariantTV(shared=True).refreshed(field, x).metric
    # in proportion to the inverse root of how much it varies: that is the nuclear norm
    assert float(metric[1, 1] / metric[0, 0]) == pytest.approx(10**0.5)
    assert float((metric @ slopes).norm()) == pytest.approx(float(slopes.norm()))


@pytest.mark.parametrize("d", [2, 3])
def test_frames_are_the_eigenvectors_of_the_structure_tensors(d):
    g = normal(30, d, d)
    tensors = torch.cat([g @ g.mT, torch.zeros(1, d, d, dtype=g.dtype), torch.eye(d, dtype=g.dtype)[None]])
    size, frame = _frames(tensors)
    torch.testing.assert_close(frame @ torch.diag_embed(size) @ frame.mT, tensors)
    torch.testing.assert_close(frame.mT @ frame, torch.eye(d, dtype=g.dtype).expand(32, d, d))
    assert (size.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("d", [2, 3])
def test_a_distance_costs_the_bending_of_its_level_sets_and_nothing_else(d):
    x = uniform(9, d, seed=2)
    radius = x.norm(dim=1)

    distance = lambda x: torch.sqrt(torch.unsqueeze(torch.sum(x * x, -1), -1))
    # the Hessian of a radius has d - 1 eigenvalues 1 / r
    expected = (0.3**2 * (d - 1) / radius**2).mean()
    torch.testing.assert_close(score(Eikonal(bend=0.3), distance, x), expected)
    torch.testing.assert_close(
        score(Eikonal(bend=0.0), lambda x: distance(x) * 3.0, x), torch.tensor(4.0, dtype=x.dtype)
    )


def test_a_negative_bend_is_refused():
    with pytest.raises(ValueError, match=r"`Eikonal\(bend=-1.0\)`: expected a finite number >= 0"):
        Eikonal(bend=-1.0)
