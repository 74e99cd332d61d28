import pytest

from neurst.core.nets import Siren
from neurst.core.penalty import TGV, DirectionalTV, IsotropicTV, NuclearTV, SpaceVariantTV
from neurst.core.tuning import LineSearch
from neurst.spatial.spec import ExpressionConfig, specify


@pytest.mark.parametrize(
    ("n_spots", "omega", "steps", "trial_steps"),
    [(10, 5.0, 500, 200), (5000, 5.0, 500, 200), (80_000, 10.0, 1000, 400), (405_000, 15.0, 1500, 600)],
)
def test_frequency_and_steps_grow_with_the_fourth_root_of_the_spots_beyond_5000(n_spots, omega, steps, trial_steps):
    spec = specify(n_spots)
    assert spec.network == Siren(omega=omega)
    assert (spec.fit.steps, spec.search.steps) == (steps, trial_steps)
    slower = specify(n_spots, config=ExpressionConfig(growth=0.0, omega=4.0, steps=300, trial_share=0.5))
    assert (slower.network.omega, slower.fit.steps, slower.search.steps) == (4.0, 300, 150)


def test_what_a_caller_chooses_is_taken_as_it_is():
    config = ExpressionConfig(learning_rate=1e-3, n_regularisation=32, refresh_every=7, held_out=0.3)
    given = {"rank": 5, "n_members": 3, "lam": 7.0, "holdout": "block", "network": Siren(width=32), "config": config}
    fit = {"steps": 40, "random_state": 3, "device": "cpu"}
    spec = specify(80_000, search=LineSearch(max_steps=6), **given, **fit)
    assert {name: getattr(spec, name) for name in given} == given
    assert {name: getattr(spec.fit, name) for name in fit} == fit
    assert (spec.fit.learning_rate, spec.fit.n_regularisation, spec.fit.refresh_every) == (1e-3, 32, 7)
    assert spec.search == LineSearch(400.0, 3.0, 6, 0.3, 16)
    assert specify(100).lam is None
    assert specify(100, steps=1).search.steps == 1  # a trial has at least one step


@pytest.mark.parametrize(("n_spots", "n_genes", "expected"), [
    (200, 13, 512),  # that is all of them
    (16_384, 13, 512),
    (16_416, 13, 513),  # a 32nd
    (178_180, 73, 5568),
    (400_000, 13, 8192),
    (16_384, 10_000, 400),  # 4 million values
    (3639, 15_928, 256),  # never fewer
])  # fmt: skip
def test_a_step_takes_a_32nd_of_the_spots_within_limits(n_spots, n_genes, expected):
    assert ExpressionConfig().batch_points(n_spots, n_genes) == expected


def test_penalties_are_named_or_specified_and_averaged_once_each():
    for given, expected in [
        ("auto", (NuclearTV(), SpaceVariantTV())),
        ("tgv", (TGV(),)),
        (TGV(a0=0.5), (TGV(a0=0.5),)),
        (("isotropic", "tgv", IsotropicTV()), (IsotropicTV(), TGV())),
    ]:
        assert specify(100, penalty=given).penalties == expected


REFUSED = {  # what a caller gives, the error, and what it says
    "an unknown name": ("tv", ValueError, "`penalty='tv'`: expected .*'isotropic'"),
    "one unknown name": (["tgv", "tv"], ValueError, r"`penalty=\['tgv', 'tv'\]`: expected"),
    "none": ([], ValueError, r"`penalty=\[\]` is empty: .*'isotropic'"),
    "auto among others": (["auto", "tgv"], ValueError, r"`penalty=\['auto', 'tgv'\]`: expected 'auto' alone, or"),
    "one for cubes": ("mixed", ValueError, "`penalty='mixed'` is for cubes with a spectral axis, which positions lack"),
    "one of several for cubes": (["nuclear", "mixed"], ValueError, "`penalty='mixed'` is for cubes"),
    "a number": (3, TypeError, "`penalty=3`: expected .*'isotropic'"),
    "one number": (["nuclear", 3], TypeError, r"`penalty=\['nuclear', 3\]`: expected 'auto' alone"),
    "a class": (NuclearTV, TypeError, "`penalty=<class .* expected 'auto' alone"),
    "one that holds arrays": (DirectionalTV([[1.0, 0.0]]), TypeError, "cannot be stored, as DirectionalTV has no name"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_penalties_that_cannot_be_fitted_or_stored_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        specify(100, penalty=given)


def test_labels_are_distinct_where_penalties_share_a_name():
    spec = specify(100, penalty=["tgv", TGV(a0=0.5), "isotropic", TGV(a0=0.7)])
    assert spec.labels() == ["tgv", "tgv_2", "isotropic", "tgv_3"]


def test_members_have_seeds_of_their_own_and_the_first_has_that_of_the_fit():
    seeds = {state: [specify(100, random_state=state).member_seed(m) for m in range(9)] for state in (0, 1, 7)}
    for state, each in seeds.items():
        assert each[0] == state
        assert len(set(each)) == 9
    assert seeds[0][1] != seeds[1][1]
