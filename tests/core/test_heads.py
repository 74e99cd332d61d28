import pytest
import torch
from draws import normal, uniform

from neurst.core.check import jet_matches_nesting
from neurst.core.heads import Affine, Identity, Loadings

N, R, C = 5, 2, 3
BIAS, GAIN, WEIGHT = normal(C, seed=1), uniform(C, seed=2, low=0.5, high=2.0), normal(C, R)
# head -> (its latent channels, eta of latents z)
HEADS = {
    "identity": (Identity(), C, lambda z: z),
    "affine": (Affine(BIAS, GAIN), C, lambda z: BIAS + GAIN * z),
    "affine, one unit": (Affine(BIAS[0], GAIN[0]), C, lambda z: BIAS[0] + GAIN[0] * z),
    "loadings": (Loadings(WEIGHT, BIAS), R, lambda z: BIAS + z @ WEIGHT.T),
    "loadings, gain": (Loadings(WEIGHT, BIAS, GAIN), R, lambda z: GAIN * (BIAS + z @ WEIGHT.T)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_its_formula_for_all_channels_and_for_some(name):
    (head, n_latent, formula), some = HEADS[name], torch.tensor([2, 0])
    z = normal(N, n_latent, seed=3)
    assert head.n_channels(n_latent) == C
    torch.testing.assert_close(head(z), formula(z))
    torch.testing.assert_close(head(z, some), formula(z)[:, some])
    for channels in (None, some):
        jet_matches_nesting(lambda u, c=channels: head(u * u, c), z, normal(2, n_latent), 2)


def test_loadings_and_intercepts_are_in_the_units_of_the_channels():
    for head, gain in [(HEADS["loadings"][0], torch.ones(C).double()), (HEADS["loadings, gain"][0], GAIN)]:
        z = normal(N, R)
        torch.testing.assert_close(head(z), head.intercept() + z @ head.loadings().T)
        torch.testing.assert_close(head.loadings(), gain[:, None] * WEIGHT)
        torch.testing.assert_close(head.prior(), WEIGHT.square().sum() / 2)  # V itself has unit variance
