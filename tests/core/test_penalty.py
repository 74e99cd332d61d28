import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from draws import NETWORKS, normal, uniform

from neurst.core import penalty as tv
from neurst.core.check import is_homogeneous, vanishes_on_constants
from neurst.core.jet import Jet, seed
from neurst.core.lattice import Lattice
from neurst.core.nets import Siren
from neurst.core.penalty import PENALTIES, evaluate

N, C = 7, 3
ALONG, WEIGHT = normal(4, 2, seed=1), uniform(N, seed=2, low=0.1, high=2.0)
ROTATION = torch.linalg.qr(normal(3, 3)).Q


def siren(d=2, c=C, seed=0):
    return Siren(width=7, depth=2).build(d, c, torch.Generator().manual_seed(seed)).double()


CASES = {
    **{name: cls() for name, cls in PENALTIES.items()},
    "third_order": tv.HigherOrderTV(3),
    "directional": tv.DirectionalTV(ALONG),
    "directional, varying": tv.DirectionalTV(normal(3, N, 2), WEIGHT),
    "directional, metric": tv.DirectionalTV(ALONG, metric=normal(C, C)),
    "weighted": tv.WeightedTV(WEIGHT),
    "weighted tgv": tv.WeightedTGV(uniform(20, 2, seed=8), uniform(20, seed=9, low=0.1), uniform(20, seed=10, low=0.1)),
    "space_variant, shared": tv.SpaceVariantTV(shared=True),
    "space_variant, no refresh yet": tv.SpaceVariantTV(),
    "edge_weighted, no refresh yet": tv.EdgeWeightedTV(),
}


@pytest.mark.parametrize("name", CASES)
def test_a_penalty_is_homogeneous_of_degree_one_and_a_constant_field_costs_nothing(name):
    x, penalty = uniform(N, 2), CASES[name]
    if "no refresh" not in name:  # weights from another field
        penalty = penalty.refreshed(siren(seed=3), uniform(40, 2, seed=4))
    penalty = penalty.at(x)
    jet = siren(c=penalty.n_outputs(C, 2))(seed(x, penalty.directions(x), penalty.order))
    assert penalty(jet) > 0
    is_homogeneous(penalty, jet)
    # the second field of TGV is a slope: a constant f has w = 0
    constant = (torch.arange(jet.shape[1]) < C).double()
    vanishes_on_constants(lambda f: penalty(Jet(f.value * constant, f.terms)), jet)


# on the plane f(x) = A x + b
SLOPE = normal(C, 3, seed=5)


def planes(x):
    return F.linear(x, SLOPE, normal(C))


def planes_with(w):
    """f = A x + b and a second field w (C, 3), constant."""
    weight, bias = torch.cat([SLOPE, torch.zeros(3 * C, 3).double()]), torch.cat([normal(C), w.flatten()])
    return lambda x: F.linear(x, weight, bias)


ON_PLANES = {
    "isotropic": (tv.IsotropicTV(), planes, SLOPE.norm(dim=1).sum()),
    "anisotropic": (tv.AnisotropicTV(), planes, SLOPE.abs().sum()),
    "vectorial": (tv.VectorialTV(), planes, SLOPE.norm()),
    "nuclear": (tv.NuclearTV(), planes, torch.linalg.svdvals(SLOPE).sum()),
    "directional": (tv.DirectionalTV(ROTATION[:2]), planes, (SLOPE @ ROTATION[:2].T).abs().sum()),
    "weighted": (tv.WeightedTV(WEIGHT), planes, WEIGHT.mean() * SLOPE.norm(dim=1).sum()),
    "second_order": (tv.HigherOrderTV(), planes, 0.0),
    "hessian": (tv.HessianTV(), planes, 0.0),
    "mixed": (tv.MixedTV(), planes, 0.1 * SLOPE[:, :2].abs().sum()),
    "tgv, w = 0": (tv.TGV(a1=2.0), planes_with(torch.zeros(C, 3).double()), 2.0 * SLOPE.norm(dim=1).sum()),
    "tgv, w = grad f": (tv.TGV(), planes_with(SLOPE), 0.0),
    "eikonal": (tv.Eikonal(), planes, (SLOPE.norm(dim=1) - 1).square().sum()),
}


@pytest.mark.parametrize("name", ON_PLANES)
def test_a_plane_costs_the_norm_of_its_slope(name):
    penalty, field, expected = ON_PLANES[name]
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(evaluate(penalty, field, uniform(N, 3)), expected, rtol=1e-9, atol=1e-12)


# on f_c(x) = x' A_c x / 2, whose Hessian is A_c
def symmetric(d):
    a = normal(2, d, d, seed=6)
    return a + a.mT


def quadratics(a):
    return lambda x: torch.cat([torch.unsqueeze(torch.sum(x * F.linear(x, part), -1), -1) * 0.5 for part in a], -1)


def with_second_field(field, matrix):
    """f = `field` with w = M x."""
    return lambda x: torch.cat([field(x), F.linear(x, matrix)], -1)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_quadratic_costs_the_norm_of_its_hessian(d):
    a, x = symmetric(d), uniform(N, d)
    frobenius = a.norm(dim=(1, 2)).sum()
    for penalty, field, expected in [
        (tv.HessianTV(), quadratics(a), frobenius),
        (tv.HigherOrderTV(2), quadratics(a), a.diagonal(dim1=1, dim2=2).abs().sum()),
        (tv.HigherOrderTV(3), quadratics(a), 0.0 * frobenius),
        (tv.HigherOrderTV(3), lambda u: u * u * u, torch.tensor(6.0 * d).double()),
        (tv.TGV(a0=0.3), with_second_field(quadratics(a), a.flatten(0, 1)), 0.3 * frobenius),  # w = grad f
    ]:
        torch.testing.assert_close(evaluate(penalty, field, x), expected, rtol=1e-9, atol=1e-9)


def test_a_rotation_as_second_field_bends_nothing():
    # sym_grad of w = M x is the symmetric part of M
    x, flat = uniform(N, 2), lambda u: u[..., :1] * 0.0
    spin, stretch = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), torch.tensor([[1.0, 2.0], [2.0, -1.0]]).double()
    for matrix in (spin, stretch, spin + stretch):
        slope = F.linear(x, matrix).norm(dim=1).mean()
        bend = torch.linalg.matrix_norm((matrix + matrix.T) / 2)
        found = evaluate(tv.TGV(a1=1.5, a0=0.4), with_second_field(flat, matrix), x)
        torch.testing.assert_close(found, 1.5 * slope + 0.4 * bend)


def test_weights_of_tgv_are_those_of_the_nearest_point():
    x, points = uniform(N, 2), uniform(30, 2, seed=4)
    field = siren(2, 3 * C)
    flat = tv.WeightedTGV(points, torch.full((30,), 1.5).double(), torch.full((30,), 0.4).double())
    torch.testing.assert_close(evaluate(flat, field, x), evaluate(tv.TGV(a1=1.5, a0=0.4), field, x))
    w1, w0 = uniform(30, seed=5, low=0.0), uniform(30, seed=6, low=0.0)
    each = [
        evaluate(tv.TGV(a1=float(w1[i]), a0=float(w0[i])), field, x[k : k + 1])
        for k, i in enumerate(torch.cdist(x, points).argmin(1))
    ]
    torch.testing.assert_close(evaluate(tv.WeightedTGV(points, w1, w0), field, x), torch.stack(each).mean())


@pytest.mark.parametrize(
    ("w1", "match"),
    [(torch.ones(3), r"`w1` has shape \(3,\): .* the 2 points"), (-torch.ones(2), "`w1` has entries down to -1")],
)
def test_wrong_weights_of_tgv_are_named(w1, match):
    with pytest.raises(ValueError, match=match):
        tv.WeightedTGV(torch.zeros(2, 2), w1, torch.ones(2))


def steps(x):
    """A step across the first axis, twice as high in the second channel, and no slopes: outputs of TGV for two channels."""
    step = torch.tanh(20 * x[..., :1])
    return torch.cat([step, 2 * step, torch.zeros_like(x), torch.zeros_like(x)], -1)


ANCHORS = uniform(500, 2, seed=8)


def box_of(points, n):
    """The lattice of n nodes along each side of the bounding box of points."""
    return Lattice(tuple(torch.linspace(a, b, n).double() for a, b in zip(points.amin(0), points.amax(0), strict=True)))


@pytest.mark.parametrize(
    "anchors", [ANCHORS, Lattice(2 * (torch.linspace(-1, 1, 40).double(),))], ids=["points", "lattice"]
)
def test_predicted_weights_of_tgv_are_small_at_edges_and_of_the_size_of_constant_ones(anchors):
    grid = box_of(anchors, 40) if isinstance(anchors, torch.Tensor) else anchors
    weights = tv.PredictedTGV(nodes=40).refreshed(steps, anchors).at(grid)
    assert float(weights.w1.mean()) == pytest.approx(1, rel=1e-5)
    rows = weights.points.points()[:, 0].abs()
    for weight, most in ((weights.w1, 0.7), (weights.w0, 0.3)):
        assert weight.min() > 0
        assert weight[rows < 0.04].mean() < most * weight[rows > 0.4].mean()
    pitch = weights.points.axes[0].diff()[0]
    assert 0.3 * pitch < (weights.w0 / weights.w1)[rows > 0.4].median() < 3 * pitch


def test_predicted_weights_of_tgv_do_not_depend_on_the_scale_of_the_field_or_on_channels_that_are_constant():
    penalty = tv.PredictedTGV(nodes=30)
    grid = box_of(ANCHORS, 30)
    one = penalty.refreshed(steps, ANCHORS).at(grid)
    scaled = penalty.refreshed(lambda x: 5 - 1e3 * steps(x), ANCHORS).at(grid)
    flat = lambda x: torch.cat(
        [steps(x)[..., :2], torch.ones_like(x[..., :1]), torch.zeros_like(steps(x)), x[..., :0]], -1
    )
    more = penalty.refreshed(lambda x: torch.cat([flat(x), 0 * x], -1)[..., :9], ANCHORS).at(grid)
    for other in (scaled, more):
        torch.testing.assert_close(other.w1, one.w1, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other.w0, one.w0, rtol=1e-3, atol=1e-4)


def test_a_constant_field_predicts_no_weights_and_tgv_is_predicted_in_two_dimensions_only():
    penalty = tv.PredictedTGV()
    assert penalty.refreshed(lambda x: 0 * steps(x) + 1, ANCHORS) is penalty
    assert penalty.n_outputs(3, 2) == 9
    with pytest.raises(ValueError, match="needs 2 coordinates, and there are 3: use 'tgv'"):
        penalty.n_outputs(1, 3)


def test_the_mixed_penalty_takes_every_spatial_axis_against_the_last():
    a, x = symmetric(3), uniform(N, 3)
    first = F.linear(x, a[:, :2].flatten(0, 1)).abs().sum(1).mean()
    torch.testing.assert_close(evaluate(tv.MixedTV(), quadratics(a), x), a[:, :2, 2].abs().sum() + 0.1 * first)
    # D_x D_z and D_y D_z of x^2 z + y z^2 are 2 x and 2 z
    cubic = lambda u: u[..., :1] * u[..., :1] * u[..., 2:] + u[..., 1:2] * u[..., 2:] * u[..., 2:]
    expected = 2 * (x[:, 0].abs() + x[:, 2].abs()).mean()
    torch.testing.assert_close(evaluate(tv.MixedTV(first_order=0.0), cubic, x), expected)
    assert [name for name, cls in PENALTIES.items() if cls.needs_spectrum] == ["mixed"]


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("name", sorted({*PENALTIES} - {"anisotropic", "second_order", "mixed", "learned_tgv"}))
def test_a_rotated_field_costs_the_same(name, d):
    q = torch.linalg.qr(normal(d, d, seed=7)).Q
    penalty, x, anchors = PENALTIES[name](), uniform(N, d), uniform(40, d, seed=4)
    field = siren(d, penalty.n_outputs(C, d))
    there = lambda u: field(F.linear(u, q))
    if name == "tgv":  # its second field turns with the coordinates
        turn = torch.block_diag(torch.eye(C).double(), *[q.T] * C)
        there = lambda u: F.linear(field(F.linear(u, q)), turn)
    expected = evaluate(penalty.refreshed(field, anchors), field, x)
    torch.testing.assert_close(evaluate(penalty.refreshed(there, anchors @ q), there, x @ q), expected)
    other = evaluate(tv.AnisotropicTV(), there, x @ q)  # the law can fail
    assert not torch.isclose(other, evaluate(tv.AnisotropicTV(), field, x), rtol=1e-3)


@pytest.mark.parametrize("d", [2, 3])
def test_a_distance_costs_the_bending_of_its_level_sets_and_nothing_else(d):
    x = uniform(9, d, seed=2)
    distance = lambda u: torch.sqrt(torch.unsqueeze(torch.sum(u * u, -1), -1))
    # the Hessian of a radius has d - 1 eigenvalues 1 / r
    expected = (0.3**2 * (d - 1) / x.norm(dim=1) ** 2).mean()
    torch.testing.assert_close(evaluate(tv.Eikonal(bending_length=0.3), distance, x), expected)
    steep = evaluate(tv.Eikonal(bending_length=0.0), lambda u: distance(u) * 3.0, x)
    torch.testing.assert_close(steep, torch.tensor(4.0).double())


# ---- total nuclear variation


@pytest.mark.parametrize("shape", [(1, N, 3), (2, N, 1), (2, N, 5), (3, N, 2), (3, N, 20)], ids=str)  # (d, N, C)
def test_the_nuclear_penalty_and_its_slope_are_those_of_the_singular_values(shape):
    terms = normal(*shape)[None].requires_grad_()
    penalty = lambda t: tv.NuclearTV()(Jet(torch.zeros_like(t[0, 0]), t))
    u, size, vh = torch.linalg.svd(terms.detach()[0].permute(1, 2, 0), full_matrices=False)
    torch.testing.assert_close(penalty(terms).detach(), size.sum(-1).mean())
    (found,) = torch.autograd.grad(penalty(terms), terms)
    torch.testing.assert_close(found[0], (u @ vh).permute(2, 0, 1) / N)  # its subgradient of least norm
    if shape[0] <= shape[2]:  # else a singular value is zero for good
        torch.autograd.gradcheck(penalty, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_jacobian_is_singular_the_slope_of_the_nuclear_penalty_is_finite(dtype):
    terms = torch.zeros(1, 2, 4, 3, dtype=dtype)
    terms[0, 0, 1] = 1.0  # rank one
    terms[0, :, 2] = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])  # rank one, in no frame of its own
    terms[0, :, 3] = 1e-30 * torch.tensor([[1.0, 2.0, 3.0], [3.0, -1.0, 0.5]])  # next to nothing
    terms.requires_grad_()
    (slope,) = torch.autograd.grad(tv.NuclearTV()(Jet(torch.zeros_like(terms[0, 0]), terms)), terms)
    assert slope.isfinite().all()
    assert not slope[:, :, 0].any()
    torch.testing.assert_close(slope[0, 0, 1], torch.full((3,), 3**-0.5 / 4, dtype=dtype))
    assert slope.flatten(2).norm(dim=1).max() < 1  # of a norm: bounded


# ---- adaptive penalties

PHI = 0.9
NORMAL = torch.tensor([math.cos(PHI), math.sin(PHI)]).double()
ADAPTIVE = pytest.mark.parametrize(
    "penalty", [tv.SpaceVariantTV(), tv.EdgeWeightedTV()], ids=["space_variant", "edge_weighted"]
)


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
    *along, across = tv.SpaceVariantTV().refreshed(slanted_edge, anchors).at(x).along  # (N, 2)
    cosine = lambda v: (F.normalize(v, dim=-1) @ NORMAL).abs()
    assert cosine(across).min() > 0.999
    assert cosine(along[0]).max() < 0.05
    # less shrinkage across the edge than along it
    assert (across.norm(dim=-1) < 0.5 * along[0].norm(dim=-1)).all()
    torch.testing.assert_close(across.norm(dim=-1) + along[0].norm(dim=-1), torch.full((9,), 2.0).double())


@pytest.mark.parametrize(
    ("slopes", "stretches"), [([2.0, 1.0], [0.5, 1.5]), ([3.0, 2.0, 1.0], [0.5, 1.5, 1.5]), ([2.0], [1.0])]
)
def test_one_direction_is_across_the_edges_and_the_others_along_them(slopes, stretches):
    # f_i = s_i x_i: across is axis 0, a = mean(s_1, ..) / s_0 and b = 2 - a
    d = len(slopes)
    plane = lambda x: F.linear(x, torch.diag(torch.tensor(slopes).double()))
    anchors = uniform(50, d)
    along = tv.SpaceVariantTV().refreshed(plane, anchors).at(anchors[:4]).along
    expected = torch.diag(torch.tensor(stretches).double()).flip(0)
    torch.testing.assert_close(along.abs(), expected[:, None].expand(d, 4, d))


@ADAPTIVE
def test_weights_have_mean_one_carry_no_unit_and_are_low_at_edges(penalty):
    anchors = uniform(1500, 2, seed=8)
    adapted = penalty.refreshed(slanted_edge, anchors)
    torch.testing.assert_close(adapted.at(anchors).weight.mean(), torch.tensor(1.0).double())
    faint = penalty.refreshed(lambda u: slanted_edge(u) * 1e-6, anchors)
    torch.testing.assert_close(faint.at(anchors).weight, adapted.at(anchors).weight)
    at_edge, off = adapted.at(0.01 * uniform(5, 2)).weight, adapted.at(0.6 * NORMAL + 0.01 * uniform(5, 2)).weight
    assert at_edge.max() < 0.3 * off.min()
    # w = c / (m + mean m): in flat parts m is nearly 0, so the ratio is 1 + m / mean m
    assert off.max() < 3
    assert not adapted.at(anchors).weight.requires_grad
    everywhere = dataclasses.replace(penalty, neighbours=2000).refreshed(slanted_edge, anchors)
    torch.testing.assert_close(everywhere.at(anchors).weight, torch.ones(1500).double())  # averaged over all points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("penalty", "plain"), [(tv.SpaceVariantTV(), tv.AnisotropicTV()), (tv.EdgeWeightedTV(), tv.IsotropicTV())], ids=repr
)
def test_a_field_without_gradient_leaves_the_plain_penalty(penalty, plain, dtype):
    constant, x, anchors = lambda u: u[..., :C] * 0.0, uniform(N, 3).to(dtype), uniform(1000, 3).to(dtype)
    field = siren(3).to(dtype)
    torch.testing.assert_close(evaluate(penalty, field, x), evaluate(plain, field, x))  # nor before the first refresh
    torch.testing.assert_close(evaluate(penalty.refreshed(constant, anchors), field, x), evaluate(plain, field, x))


@ADAPTIVE
def test_a_field_without_gradient_in_one_half_makes_no_nan(penalty):
    half, x, net = lambda u: torch.relu(u[..., :1]), uniform(50, 2), siren()
    adapted = penalty.refreshed(half, uniform(200, 2, seed=8))
    evaluate(adapted, net, x).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    weight = adapted.at(x).weight
    assert weight.isfinite().all()
    assert weight[x[:, 0] < -0.3].min() > weight[x[:, 0] > 0.3].max()


@ADAPTIVE
def test_an_adapted_penalty_is_refreshed_as_the_one_it_came_from(penalty):
    x, first, second = uniform(40, 2), siren(), siren(seed=3)
    again = penalty.refreshed(first, x).refreshed(second, x)
    assert again.spec == penalty
    torch.testing.assert_close(again.at(x).weight, penalty.refreshed(second, x).at(x).weight)
    assert again.n_outputs(3, 2) == 3


def test_frames_of_the_channels_do_not_matter_to_shared_space_variant_tv():
    field, x = siren(), uniform(40, 2, seed=4)
    turned = lambda u: F.linear(field(u), ROTATION)
    costs = [evaluate(tv.SpaceVariantTV(shared=True).refreshed(f, x), f, x) for f in (field, turned)]
    torch.testing.assert_close(*costs)
    assert tv.SpaceVariantTV(shared=True).at(x) == tv.VectorialTV()  # nor before the first refresh


def test_a_combination_of_channels_that_varies_little_costs_more_for_each_unit_of_its_slope():
    slopes = torch.tensor([[1.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    field, x = lambda u: F.linear(u, slopes), uniform(40, 2, seed=4)
    metric = tv.SpaceVariantTV(shared=True).refreshed(field, x).at(x).metric
    # in proportion to the inverse root of how much it varies: that is the nuclear norm
    assert float(metric[1, 1] / metric[0, 0]) == pytest.approx(10**0.5)
    assert float((metric @ slopes).norm()) == pytest.approx(float(slopes.norm()))


# ---- with networks


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_has_finite_gradients_in_every_dimension_and_of_every_network(name):
    penalty = PENALTIES[name]()
    for d, network in [*((2, network) for network in NETWORKS), (1, "siren"), (3, "spline")]:
        if name == "learned_tgv" and d != 2:
            continue
        net = NETWORKS[network].build(d, penalty.n_outputs(2, d), torch.Generator().manual_seed(0))
        x = uniform(9, d).float()
        for current in (penalty, penalty.refreshed(net, uniform(30, d).float())):
            net.zero_grad(set_to_none=True)
            cost = evaluate(current, net, x)
            assert cost.shape == ()
            cost.backward()
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            assert grads
            assert all(g.isfinite().all() for g in grads)
