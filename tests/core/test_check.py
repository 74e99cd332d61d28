import pytest
import torch
from draws import normal, uniform
from torch import nn

from neurst.core import check
from neurst.core.jet import Jet, seed
from neurst.core.penalty import IsotropicTV

X, JET = uniform(5, 2), seed(uniform(5, 2), order=2)


class WrongJet(nn.Module):
    """x^3, whose jet has a wrong third coefficient."""

    def forward(self, x):
        out = x**3
        if not isinstance(x, Jet):
            return out
        return Jet(out.value, out.terms * torch.tensor([1.0, 1.0, 1.001]).double()[: out.order, None, None, None])


TV, CUBE = IsotropicTV(), lambda x: x**3
along = lambda part: lambda f: part(f.derivative(1))
LAWS = {
    "jet": (lambda f: check.jet_matches_nesting(f, X, normal(2, 2), 3), CUBE, WrongJet()),
    "homogeneous": (lambda f: check.is_homogeneous(f, JET), TV, lambda f: TV(f) ** 2),
    "homogeneous, sign": (lambda f: check.is_homogeneous(f, JET), along(lambda u: u.abs().sum()), along(torch.sum)),
    "constants": (lambda f: check.vanishes_on_constants(f, JET), TV, along(lambda u: (u - 1).square().sum())),
    "constants, gradient": (lambda f: check.vanishes_on_constants(f, JET), along(lambda u: u.square().sum()), along(lambda u: u.square().sum().sqrt())),
    "units": (lambda f: check.units_do_not_matter(f, X), lambda x: lambda at: (at - x.mean(0)) / x.std(0), lambda x: lambda at: at - x.mean(0)),
}  # fmt: skip


@pytest.mark.parametrize(("law", "obeys", "breaks"), LAWS.values(), ids=LAWS)
def test_a_law_accepts_what_obeys_it_and_refuses_what_breaks_it(law, obeys, breaks):
    law(obeys)
    with pytest.raises(AssertionError, match="not close|not equal"):
        law(breaks)


def test_a_derivative_by_nesting_is_that_of_the_formula():
    found = check.derivative_by_nesting(lambda x: (x**3).sum(-1, keepdim=True), X, torch.tensor([1.0, 0.0]).double(), 2)
    torch.testing.assert_close(found, 6 * X[:, :1])
