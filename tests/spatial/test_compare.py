import dataclasses
import tracemalloc

import numpy as np
import pytest
from heldout import EMPTY, KINDS, G, N, counted, normalised, small_spec

from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.baselines import COUNT_BASELINES, nearest_cv, rate_of_logs
from neurst.spatial.evaluate.compare import Comparison, best_baseline, compare, known_methods
from neurst.spatial.evaluate.scores import deviance_explained, deviance_explained_per_gene
from neurst.spatial.evaluate.splits import split
from neurst.spatial.fit import fit_expression
from neurst.spatial.observation import Counts, Normalised

# the log-normalised field chooses its strength, by so short a search that it may end at its edge
pytestmark = pytest.mark.filterwarnings("ignore:the search for `lam` ended")
METHODS = {
    "counts": ["nearest", "kernel", "kriging", "kriging_log", "no_tv", "lognorm"],
    "normalised": ["nearest", "kernel", "kriging", "no_tv"],
}


def make_spec(n_spots, seed):
    return small_spec(steps=10, random_state=seed)


def compared(data, methods, *, seeds=(0,), holdout="random", fraction=0.2, on_progress=lambda *now: None):
    options = {"seeds": seeds, "holdout": holdout, "fraction": fraction, "on_progress": on_progress}
    return compare(data, make_spec, methods, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_a_row_for_each_seed_and_method_and_progress_reaches_its_end(kind):
    seen, methods = [], METHODS[kind]
    found = compared(KINDS[kind](), methods, seeds=(0, 3), on_progress=lambda *now: seen.append(now))
    names = [name for name in methods if name in COUNT_BASELINES]
    names += ["field", *(name for name in methods if name not in COUNT_BASELINES)]
    assert [(row["seed"], row["method"]) for row in found.rows] == [(seed, name) for seed in (0, 3) for name in names]
    for row, per_gene in zip(found.rows, found.per_gene, strict=True):
        assert (row["holdout"], row["n_train"], row["n_test"]) == ("random", N - 48, 48)
        assert np.isfinite([row["score"], row["median_r"]]).all()
        assert row["seconds"] > 0
        assert np.isnan(row["lam"]) == (row["method"] in COUNT_BASELINES)
        assert per_gene.shape == (G,)
        assert per_gene[EMPTY] == 0
    lam = {row["method"]: row["lam"] for row in found.rows}
    assert (lam["field"], lam["no_tv"]) == (30.0, 0.0)
    done, planned, stages = zip(*seen, strict=True)
    assert set(planned) == {done[-1]}
    assert (np.diff(done) >= 0).all()
    assert "seed 3, field: fitting" in stages


def test_all_methods_learn_from_the_same_spots_and_are_scored_on_the_others():
    data = counted()
    train, test = (data.take(part) for part in split(data.coords, "block", random_state=3, fraction=0.3))
    size, rate = test.observation.size, train.mean_rate()
    spec, logs = make_spec(len(train.coords), 3), dataclasses.replace(train, observation=Normalised())
    logs = dataclasses.replace(logs, values=train.observation.normalised(train.values))
    field = lambda part, lam: fit_expression(part, dataclasses.replace(spec, lam=lam), target_sum=1.0).field(
        test.coords
    )
    expected = {
        "nearest": nearest_cv(train.coords, train.values, train.observation.size, test.coords),
        "field": field(train, 30.0),
        "no_tv": field(train, 0.0),
        "lognorm": rate_of_logs(field(logs, None), rate),
    }
    found = compared(data, ["nearest", "no_tv", "lognorm"], seeds=[3], holdout="block", fraction=0.3)
    for row in found.rows:
        prediction = expected[row["method"]]
        assert row["score"] == pytest.approx(deviance_explained(test.values, size, prediction, rate), rel=1e-6)
        genes = deviance_explained_per_gene(test.values, size, prediction, rate)
        np.testing.assert_allclose(found.gene_scores(row["method"]), genes, rtol=1e-5, atol=1e-7)
        assert row["median_r"] == pytest.approx(test.observation.correlation(test.values, prediction), rel=1e-6)


def test_scores_are_averaged_over_seeds_and_the_field_is_no_baseline():
    rows = [{"method": name, "score": score} for name, score in (("a", 0.1), ("field", 0.9), ("b", 0.4), ("a", 0.5))]
    found = Comparison(rows, [np.array([k, 2.0 * k]) for k in range(4)])
    np.testing.assert_array_equal(found.gene_scores("a"), [1.5, 3.0])
    np.testing.assert_array_equal(found.gene_scores("field"), [1.0, 2.0])
    assert np.isnan(found.gene_scores(None)).all()
    assert found.best_baseline() == "b"
    assert best_baseline([("field", 1.0)]) is None


def test_methods_are_known_by_the_kind_of_data_without_a_look_at_all_values():
    assert known_methods(counted()) == [*COUNT_BASELINES, "no_tv", "lognorm"]
    assert known_methods(normalised()) == ["nearest", "kernel", "kriging", "no_tv"]
    n = 20_000
    wide = SpotData(np.zeros((n, 2)), np.ones((n, 50)), np.arange(50).astype(str), Counts(np.ones(n)))
    tracemalloc.start()
    try:
        known_methods(wide)
        assert tracemalloc.get_traced_memory()[1] < wide.values.nbytes / 10
    finally:
        tracemalloc.stop()


LINE = np.column_stack([np.arange(20.0), 2 * np.arange(20.0)])
LINE[3] += [0.0, 9.0]  # the one spot beside it
HIDES_IT = next(seed for seed in range(9) if 3 in split(LINE, fraction=0.5, random_state=seed)[1])
REFUSED = {  # data, methods, options, what the error says
    "an unknown method": (counted(), ["nearest", "gam"], {}, r"`baselines`: 'gam' is no method for counts: expected some of \['nearest', 'kernel', .*'lognorm'\]"),
    "four spots": (counted(4), ["nearest"], {"fraction": 0.4}, "hides 1 of 4 spots and leaves 3 to learn from"),
    "nothing hidden": (counted(9), ["nearest"], {"fraction": 0.1}, "`fraction=0.1` hides 0 of 9 spots and leaves 9"),
    "a line": (dataclasses.replace(counted(20), coords=LINE), ["nearest"], {"fraction": 0.5, "seeds": [HIDES_IT]}, f"the 10 spots that `fraction=0.5` and seed {HIDES_IT} leave lie on a line: pass another seed"),
    "no counts": (counted().take_genes(np.array([EMPTY])), ["nearest"], {}, "none of the 1 genes varies between the 193"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "methods", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_a_comparison_that_cannot_be_is_refused(data, methods, options, words):
    with pytest.raises(ValueError, match=words):
        compared(data, methods, **options)
