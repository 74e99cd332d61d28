import dataclasses

import numpy as np
import pytest

from neurst.core.nets import Siren, Spline
from neurst.core.penalty import TGV, DirectionalTV, IsotropicTV, NuclearTV, SpaceVariantTV
from neurst.core.tuning import LineSearch
from neurst.spatial.priors import ALTERNATIVES, Constant, GaussianProcess, prior_from_dict, prior_to_dict
from neurst.spatial.spec import Candidate, ExpressionConfig, specify


@pytest.mark.parametrize(
    ("n_spots", "omega", "rank"),
    [(10, 5.0, 20), (5000, 5.0, 20), (80_000, 10.0, 40), (405_000, 15.0, 60), (10**8, 59.5, 60)],
)
def test_frequency_and_rank_grow_with_the_fourth_root_of_the_spots_beyond_5000(n_spots, omega, rank):
    spec = specify(n_spots)
    assert (spec.networks[0], spec.rank) == (Siren(omega=omega), rank)
    assert (spec.fit.steps, spec.search.steps) == (400, round(400 * ExpressionConfig().trial_share))  # at any size
    slower = specify(n_spots, config=ExpressionConfig(growth=0.0, omega=4.0, steps=300, trial_share=0.5))
    assert (slower.networks[0].omega, slower.rank, slower.fit.steps, slower.search.steps) == (4.0, 20, 300, 150)
    assert specify(n_spots, rank=7).rank == 7


@pytest.mark.parametrize(("n_spots", "d", "finest"), [(6400, 2, 48), (90_000, 2, 180), (27_000, 3, 18)])
def test_a_large_section_has_a_spline_as_well_with_three_spots_or_so_in_each_finest_cell(n_spots, d, finest):
    siren, spline = specify(n_spots, d).networks
    assert isinstance(siren, Siren)
    assert spline == Spline((*(max(2, round(finest / 2**k)) for k in (3, 2, 1)), finest))
    assert 2 < n_spots / finest**d < 5
    assert len(specify(5000, d).networks) == 1
    assert specify(n_spots, d, network="spline").networks == (Spline(),)


def test_what_a_caller_chooses_is_taken_as_it_is():
    config = ExpressionConfig(learning_rate=1e-3, n_regularisation=32, refresh_every=7, held_out=0.3, trial_share=0.4)
    given = {"rank": 5, "n_members": 3, "lam": 7.0, "config": config}
    fit = {"steps": 40, "random_state": 3, "device": "cpu"}
    spec = specify(80_000, search=LineSearch(max_steps=6), network=[Siren(width=32), "siren"], **given, **fit)
    assert {name: getattr(spec, name) for name in given} == given
    assert {name: getattr(spec.fit, name) for name in fit} == fit
    assert spec.networks == (Siren(width=32), Siren())
    assert (spec.fit.learning_rate, spec.fit.n_regularisation, spec.fit.refresh_every) == (1e-3, 32, 7)
    assert dataclasses.replace(spec.search, start=1.0) == LineSearch(1.0, 3.0, 6, 0.3, 16)
    assert specify(100).lam is None
    assert specify(100, steps=1).search.steps == 1  # a trial has at least one step
    assert specify(100, search=LineSearch(start=3.0)).search.start == 3.0


@pytest.mark.parametrize(("network", "n_spots", "n_genes", "share", "expected"), [
    (Siren(), 200, 13, 1.0, 512),  # that is all of them
    (Siren(), 16_384, 13, 1.0, 512),
    (Siren(), 16_416, 13, 1.0, 513),  # a 32nd
    (Siren(), 400_000, 13, 1.0, 1024),
    (Siren(), 16_384, 10_000, 1.0, 400),  # 4 million values
    (Siren(), 3639, 15_928, 1.0, 256),  # never fewer
    (Spline(), 40_000, 13, 1.0, 2048),
    (Spline(), 60_000, 13, 1.0, 3000),  # a 20th
    (Spline(), 60_000, 13, 0.4, 1200),  # of a trial
    (Spline(), 400_000, 13, 1.0, 8192),
    (Spline(), 400_000, 10_000, 1.0, 400),
])  # fmt: skip
def test_a_step_takes_a_share_of_the_spots_within_limits(network, n_spots, n_genes, share, expected):
    assert ExpressionConfig().batch_points(network, n_spots, n_genes, share) == expected


def test_a_trial_of_a_network_has_fewer_steps_and_one_of_a_spline_fewer_spots():
    config = ExpressionConfig(trial_share=0.25, spline_regularisation=77, spline_learning_rate=0.02)
    spec = specify(60_000, config=config, random_state=4)
    siren, spline = spec.networks
    final, trial = spec.fit_of(siren, 60_000, 13), spec.fit_of(siren, 60_000, 13, trial=True)
    assert (final.steps, final.learning_rate, final.batch_points) == (400, 3e-3, 1024)
    assert (trial.steps, trial.learning_rate, trial.batch_points) == (100, 5e-3, 1024)
    final, trial = spec.fit_of(spline, 60_000, 13), spec.fit_of(spline, 60_000, 13, trial=True, random_state=9)
    assert (final.steps, final.learning_rate, final.batch_points, final.n_regularisation) == (300, 0.02, 3000, 77)
    assert (trial.steps, trial.learning_rate, trial.batch_points, trial.n_regularisation) == (300, 0.02, 750, 77)
    assert (final.random_state, trial.random_state) == (4, 9)
    assert specify(60_000, steps=10).fit_of(spline, 60_000, 13).steps == 10
    given = dataclasses.replace(spec, fit=dataclasses.replace(spec.fit, batch_points=99))
    assert (
        given.fit_of(siren, 60_000, 13).batch_points == given.fit_of(spline, 60_000, 13, trial=True).batch_points == 99
    )


@pytest.mark.parametrize(("n_spots", "folds"), [(4, 3), (700, 3), (1000, 2), (1400, 1), (2000, 1), (10**6, 1)])
def test_small_sections_are_divided_several_times(n_spots, folds):
    assert specify(n_spots).n_folds(n_spots) == folds
    assert specify(n_spots, config=ExpressionConfig(most_folds=1)).n_folds(n_spots) == 1


def test_penalties_are_named_or_specified_and_averaged_once_each():
    process = GaussianProcess(lengths=(3.0, 9.0))
    for given, expected in [
        ("auto", (NuclearTV(), SpaceVariantTV(), GaussianProcess(), Constant())),
        ("tgv", (TGV(),)),
        (TGV(a0=0.5), (TGV(a0=0.5),)),
        (("isotropic", "tgv", IsotropicTV()), (IsotropicTV(), TGV())),
        ("gaussian_process", (GaussianProcess(),)),
        (("constant", process, "gaussian_process", Constant()), (Constant(), process, GaussianProcess())),
    ]:
        assert specify(100, penalty=given).penalties == expected
    assert specify(20_000).penalties == specify(100).penalties
    assert specify(20_001).penalties == (NuclearTV(), GaussianProcess(), Constant())
    assert specify(20_001, penalty="tgv").penalties == (TGV(),)


def test_a_spec_knows_whether_it_has_a_spread_and_a_constant():
    known = {given: (specify(100, penalty=given)) for given in ("auto", "tgv", "gaussian_process", ("tgv", "constant"))}
    assert [spec.has_spread for spec in known.values()] == [True, False, True, False]
    assert [spec.has_constant for spec in known.values()] == [True, False, False, True]


@pytest.mark.parametrize(
    ("penalty", "expected"), [("auto", (NuclearTV(), SpaceVariantTV())), ("gaussian_process", (IsotropicTV(),))]
)
def test_without_penalties_the_networks_are_fitted_alone(penalty, expected):
    spec = specify(100, penalty=penalty).without_penalty()
    assert (spec.penalties, spec.lam) == (expected, 0.0)
    assert all(candidate.network == Siren() for candidate in spec.candidates())


PRIORS = [TGV(a0=0.5), GaussianProcess(lengths=(3.0, 9.0), functions=100, margin=0.2), GaussianProcess(), Constant()]


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_a_prior_is_read_back_from_its_name_and_numbers(prior):
    stored = prior_to_dict(prior)
    assert prior_from_dict(stored) == prior
    assert (
        prior_from_dict({name: np.array(part) if isinstance(part, list) else part for name, part in stored.items()})
        == prior
    )
    assert set(ALTERNATIVES) == {"gaussian_process", "constant"}


@pytest.mark.parametrize(("numbers", "words"), [
    ({"lengths": ()}, r"`GaussianProcess.lengths=\(\)`: expected"),
    ({"lengths": (1.0, -2.0)}, r"`GaussianProcess.lengths=.*-2.0.*: expected"),
    ({"functions": 3}, "`GaussianProcess.functions=3`: expected"),
    ({"margin": -0.1}, "`GaussianProcess.margin=-0.1`: expected"),
])  # fmt: skip
def test_a_gaussian_process_names_the_number_it_refuses(numbers, words):
    with pytest.raises(ValueError, match=words):
        GaussianProcess(**numbers)


REFUSED = {  # what a caller gives, the error, and what it says
    "an unknown name": ("tv", ValueError, "`penalty='tv'`: expected .*'isotropic'"),
    "one unknown name": (["tgv", "tv"], ValueError, r"`penalty=\['tgv', 'tv'\]`: expected"),
    "none": ([], ValueError, r"`penalty=\[\]` names no field that could be fitted: .*'isotropic'"),
    "auto among others": (["auto", "tgv"], ValueError, r"`penalty=\['auto', 'tgv'\]`: expected 'auto' alone, or"),
    "one for cubes": ("mixed", ValueError, "`penalty='mixed'` is for cubes with a spectral axis, which positions lack"),
    "one of several for cubes": (["nuclear", "mixed"], ValueError, "`penalty='mixed'` is for cubes"),
    "a constant alone": ("constant", ValueError, "`penalty='constant'` names no field that could be fitted: expected"),
    "constants alone": ([Constant(), "constant"], ValueError, "names no field that could be fitted"),
    "a number": (3, TypeError, "`penalty=3`: expected .*'isotropic'"),
    "one number": (["nuclear", 3], TypeError, r"`penalty=\['nuclear', 3\]`: expected 'auto' alone"),
    "a class": (NuclearTV, TypeError, "`penalty=<class .* expected 'auto' alone"),
    "one that holds arrays": (DirectionalTV([[1.0, 0.0]]), TypeError, "cannot be stored, as DirectionalTV has no name"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_penalties_that_cannot_be_fitted_or_stored_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        specify(100, penalty=given)


def test_candidates_have_distinct_names_where_penalties_share_one():
    spec = specify(100, penalty=["tgv", TGV(a0=0.5), "isotropic", TGV(a0=0.7), "constant"])
    assert [each.name for each in spec.candidates()] == ["tgv", "tgv_2", "isotropic", "tgv_3"]  # the constant is none
    assert [each.prior for each in spec.candidates()] == list(spec.penalties[:-1])
    assert {each.network for each in spec.candidates()} == {Siren()}


def test_other_networks_are_fitted_with_the_first_penalty_only():
    siren, spline, process = Siren(width=9), Spline((2, 4)), GaussianProcess()
    spec = specify(100, penalty=["gaussian_process", "tgv", "isotropic", "constant"], network=[siren, spline, "spline"])
    expected = [
        Candidate("gaussian_process", process),
        Candidate("tgv", TGV(), siren),
        Candidate("tgv_spline", TGV(), spline),
        Candidate("tgv_spline_2", TGV(), Spline()),
        Candidate("isotropic", IsotropicTV(), siren),
    ]
    assert spec.candidates() == expected
    assert [each.name for each in specify(10**5).candidates()] == ["nuclear", "nuclear_spline", "gaussian_process"]
    found = [spec.search_of(each) for each in expected]
    assert [search.start for search in found] == [1.0, 400.0, 400.0, 400.0, 400.0]
    assert all(dataclasses.replace(search, start=None) == spec.search for search in found[1:])
    assert spec.search_of(expected[0]) == LineSearch(1.0, 3.0, 4, 0.2, 1)  # relative to the marginal likelihood


@pytest.mark.parametrize("start", [None, 400.0, 50.0])
def test_a_start_that_is_asked_for_holds_for_every_network(start):
    spec = specify(100, search=LineSearch(start=start))
    found = {each.name: spec.search_of(each).start for each in spec.candidates()}
    assert found["gaussian_process"] == 1.0
    assert (found["nuclear"], found["space_variant"]) == ((400.0, 133.0) if start is None else (start, start))


def test_the_search_for_the_strength_of_the_space_variant_penalty_starts_lower_unless_told():
    for given, first, other in ((None, 133.0, 400.0), (50.0, 50.0, 50.0)):
        spec = specify(100, search=LineSearch(start=given))
        starts = {each.name: spec.search_of(each).start for each in spec.candidates()}
        assert starts == {"nuclear": other, "space_variant": first, "gaussian_process": 1.0}


def test_members_have_seeds_of_their_own_and_the_first_has_that_of_the_fit():
    seeds = {state: [specify(100, random_state=state).member_seed(m) for m in range(9)] for state in (0, 1, 7)}
    for state, each in seeds.items():
        assert each[0] == state
        assert len(set(each)) == 9
    assert seeds[0][1] != seeds[1][1]
