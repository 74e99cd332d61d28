"""Projections: Moreau's identity, non-expansive, and finite gradients everywhere."""

import pytest
import torch
from draws import normal, uniform

from neurst.core.prox import ball, box

P = 3 * normal(2, 3, 5, 4)
COMPLEX = torch.complex(P, 3 * normal(2, 3, 5, 4, seed=1))
RADIUS = uniform(2, 1, 5, 4, seed=2, low=0.0, high=3.0)
PROJECTIONS = {  # projection, and the norm whose dual ball it projects to
    "ball": (lambda p, r: ball(p, r, 1), lambda p: p.abs().square().sum(1, keepdim=True).sqrt()),
    "joint ball": (lambda p, r: ball(p, r, (1, 3)), None),
    "box": (box, lambda p: p.abs().sum(1, keepdim=True)),
}


@pytest.mark.parametrize("p", [P, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("name", ["ball", "box"])
def test_moreau_the_rest_of_a_projection_is_the_proximal_point_of_the_norm(name, p):
    # q = p - P(p) minimises r |q| + |q - p|^2 / 2, so no other point is better
    project, norm = PROJECTIONS[name]
    q = p - project(p, RADIUS)
    cost = lambda q: (RADIUS * norm(q)).sum() + (q - p).abs().square().sum() / 2
    for seed in range(20):
        assert cost(q + 10.0 ** -(seed % 4) * normal(*p.shape, seed=seed)) > cost(q)


@pytest.mark.parametrize("p", [P, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_is_idempotent_and_does_not_expand(name, p):
    project = PROJECTIONS[name][0]
    radius = RADIUS.amin((1, 3), keepdim=True) if name == "joint ball" else RADIUS
    once = project(p, radius)
    torch.testing.assert_close(project(once, radius), once)
    for seed in range(5):
        other = p + 10.0 ** (1 - seed) * normal(*p.shape, seed=seed + 20)
        assert (once - project(other, radius)).abs().square().sum() <= (p - other).abs().square().sum()


def test_a_ball_commutes_with_rotations_and_a_box_does_not():
    turn = torch.linalg.qr(normal(3, 3)).Q
    rotate = lambda p: torch.einsum("ij,njhw->nihw", turn, p)
    torch.testing.assert_close(rotate(ball(P, RADIUS, 1)), ball(rotate(P), RADIUS, 1))
    assert not torch.allclose(rotate(box(P, RADIUS)), box(rotate(P), RADIUS))


@pytest.mark.parametrize("name", ["ball", "box"])
def test_a_complex_projection_keeps_phases(name):
    project = PROJECTIONS[name][0]
    phase = torch.polar(torch.tensor(1.0), torch.tensor(0.7)).to(torch.complex128)
    torch.testing.assert_close(project(phase * COMPLEX, RADIUS), phase * project(COMPLEX, RADIUS))


@pytest.mark.parametrize("name", ["ball", "box"])
def test_radius_zero_and_the_origin_give_zero_and_finite_gradients(name):
    p = P.clone()
    p[:, :, 0] = 0
    radius = RADIUS.clone()
    radius[..., :2] = 0
    p.requires_grad_()
    radius.requires_grad_()
    out = PROJECTIONS[name][0](p, radius)
    assert (out[..., :2] == 0).all()
    for slope in torch.autograd.grad(out.square().sum(), (p, radius)):
        assert torch.isfinite(slope).all()
