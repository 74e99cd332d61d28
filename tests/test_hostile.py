"""A sample of the hostile inputs of `hostile.py`: none is a finding, and a finding would be seen."""

import warnings

import numpy as np
import pytest
import torch
from hostile import Case, Materials, finding, findings, make_case, verbs
from sections import section

SAMPLE = 300


def test_hostile_inputs_are_refused_in_words_or_work():
    assert [f"{seed}: {case}\n{wrong}" for seed, case, wrong in findings(range(SAMPLE))] == []


def test_every_case_is_odd_and_some_are_refused_and_some_work(tmp_path):
    m = Materials()
    cases, outcomes = [make_case(seed, m, verbs(m)) for seed in range(100)], []
    for case in cases:
        assert case.words
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.call()
            outcomes.append("works")
        except (ImportError, KeyError, OSError, TypeError, ValueError):
            outcomes.append("refused")
    assert min(map(outcomes.count, ("works", "refused"))) >= 10, outcomes


def harm(adata, error):
    adata.uns["harm"] = 1
    raise error


# what a call does, and what is said of it
FINDINGS = {
    "a library fails": (lambda adata: np.zeros(2).reshape(3), "the error of a library, ValueError"),
    "a kind of error": (lambda adata: adata.nothing, "an error of another kind, AttributeError"),
    "an interrupt that was not asked for": (lambda adata: harm(adata, KeyboardInterrupt()), "the AnnData was changed"),
    "data are changed": (lambda adata: harm(adata, ValueError("`a`")), "the AnnData was changed"),
    "a warning of a library": (lambda adata: np.log(np.zeros(1)), "an error of another kind, RuntimeWarning"),
    "the random state": (lambda adata: torch.manual_seed(1), "it changed the random state"),
}


@pytest.mark.parametrize(("call", "words"), FINDINGS.values(), ids=FINDINGS)
def test_a_finding_would_be_seen(tmp_path, call, words):
    adata, state = section(radius=2), torch.get_rng_state()
    try:
        assert words in finding(Case("verb", "words", lambda: call(adata), adata), tmp_path)
    finally:
        torch.set_rng_state(state)


def test_results_that_a_file_cannot_hold_are_found(tmp_path):
    adata = section(radius=2)
    case = Case("tl.neurtv_fit", "words", lambda: adata.uns.update(a=object()), adata)
    assert "cannot be stored" in finding(case, tmp_path)
