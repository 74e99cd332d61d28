"""Conventions that hold for every public verb, and pages that say what the code does."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from sections import QUICK, SOME, section, slots_of, stack

import neurst
from neurst import datasets, get, imaging, pl, tl
from neurst.imaging import metrics

DOCS = Path(__file__).parent.parent / "docs"
VERBS = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (tl, get, pl, imaging, datasets)
    for name in room.__all__
    if inspect.isfunction(getattr(room, name))
}
# arguments that are something else in each verb that has them
OWN = {"adata", "ax", "key_added", "path", "query"}
# what is drawn, and the name of scores; a range of noise levels, and the strength of a denoiser
EXCEPTIONS = {
    ("neurst.imaging.fit_lofi", "sigma"), ("neurst.imaging.plug_and_play", "sigma"),
    ("neurst.pl.superres", "genes"), ("neurst.pl.superres", "layer"), ("neurst.pl.gradient", "genes"), ("neurst.pl.holdout_score", "key"),
}  # fmt: skip
# pixels that are filled or divided are taken as exact
DEFAULTS = {("neurst.imaging.inpaint", "sigma"), ("neurst.imaging.upsample", "sigma")}
ROOMS = {"spatial": ("neurst.tl", "neurst.get", "neurst.pl", "neurst.datasets"), "imaging": ("neurst.imaging",)}


def sections_of(function):
    """The sections of a docstring: heading -> text."""
    parts = re.split(r"\n(\w+(?: \w+)?)\n-{3,}\n", "\n" + inspect.getdoc(function))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(function):
    """What a docstring says of each parameter."""
    found = {}
    for names, text in re.findall(r"^([a-z_, ]+)\n((?:[ \n].*\n?)+)", sections_of(function)["Parameters"] + "\n", re.M):
        found |= dict.fromkeys(re.split(r", ", names.strip()), " ".join(text.split()))
    return found


def parameters(function):
    return inspect.signature(function).parameters


def shared():
    """Arguments that several verbs of the spatial rooms, or of imaging, have: (room, name) -> verbs."""
    found = {}
    for room, modules in ROOMS.items():
        verbs = [v for v in VERBS if v.startswith(modules)]
        for name in sorted({name for v in verbs for name in parameters(VERBS[v])} - OWN):
            having = [v for v in verbs if name in parameters(VERBS[v]) and (v, name) not in EXCEPTIONS]
            if len(having) > 1:
                found[room, name] = having
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_of_a_verb_is_checked_and_documented(verb):
    function = VERBS[verb]
    names = set(parameters(function))
    assert set(documented(function)) == names
    assert set(function.rules) == names, "every verb is decorated with `checked` and a rule for each argument"
    assert {"Parameters", "Raises", "Examples"} <= set(sections_of(function))
    assert {"Returns", "Yields"} & set(sections_of(function))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_at_most_three_arguments_by_position(verb):
    by_position = [p for p in parameters(VERBS[verb]).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(by_position) <= 3
    assert not any(isinstance(p.default, bool) for p in by_position)


def first_sentence(text):
    return re.split(r"(?<=[.:;]) ", text)[0]


@pytest.mark.parametrize(("room", "name"), shared())
def test_a_shared_argument_has_one_default_one_rule_and_one_sentence(room, name):
    names = shared()[room, name]
    texts = {v: documented(VERBS[v])[name] for v in names}
    references = {v: re.match(r"As in :func:`(\w+)`", text) for v, text in texts.items()}
    assert len({first_sentence(texts[v]) for v in names if not references[v]}) == 1, texts
    for v, reference in references.items():
        if reference:
            other = ".".join([*v.split(".")[:-1], reference[1]])
            assert name in documented(VERBS[other]), f"{v} refers to {other}"
    if name == "config":  # each method has numbers of its own
        return
    defaults = {repr(parameters(VERBS[v])[name].default) for v in names if (v, name) not in DEFAULTS}
    assert len(defaults - {repr(inspect.Parameter.empty)}) <= 1, defaults
    if (room, name) != ("imaging", "sigma"):  # one number, or one for each channel
        assert len({(VERBS[v].rules[name].expected, VERBS[v].rules[name].advice) for v in names}) == 1


# ---- docs/slots.md


def promised(text, *, by):
    """Slots in a table of the page, of the verbs whose name stands in the second column."""
    found = set()
    for row in re.findall(r"^\| (`.+)$", text, re.M):
        slots, verb = row.split(" | ")[:2]
        if by in verb:
            found |= set(re.findall(r'`(\w+)\["(.+?)"\]`', slots))
    return found


PAGE = (DOCS / "slots.md").read_text()
WRITTEN = PAGE.split("## What is written")[1].split("\n## ")[0]
ENTRIES = set(
    re.findall(
        r"`(\w+)`",
        "".join(
            row.split("|")[1]
            for row in PAGE.split("of a fit holds")[1].split("\n## ")[0].splitlines()
            if row.startswith("| `")
        ),
    )
)
RETURNED = PAGE.split("return\n")[1].split("\n## ")[0]


def as_page(slots, key):
    """Slots as they are named on the page."""
    return {
        (part, name.replace(key, "<key>", 1) if part != "obsm" or key in name else name)
        for part, name in (s.split("/", 1) for s in slots)
    }


def test_the_page_of_slots_says_what_is_written_and_nothing_else():
    written = {"neurtv_fit": set(), "neurtv_gradient": set(), "holdout_score": set()}
    normalised = section(radius=3)
    normalised.X = np.log1p(normalised.X.toarray())
    for adata, options in (
        (section(radius=3), {"penalty": ["nuclear", "gaussian_process"]}),
        (normalised, {}),
        (section(radius=3), {"genes": SOME, "penalty": "auto"}),
        (stack(), {}),
        (stack(), {"genes": ["gene1"]}),
    ):
        before = slots_of(adata)
        tl.neurtv_fit(adata, **(QUICK | options))
        fitted = slots_of(adata)
        assert set(adata.uns["neurtv"]) == ENTRIES
        tl.neurtv_gradient(adata)
        written["neurtv_fit"] |= as_page(fitted - before, "neurtv")
        written["neurtv_gradient"] |= as_page(slots_of(adata) - fitted, "neurtv")
    adata = section(radius=3)
    before = slots_of(adata)
    tl.holdout_score(adata, **QUICK)
    written["holdout_score"] = as_page(slots_of(adata) - before, "holdout_score")
    for verb, slots in written.items():
        assert slots == promised(WRITTEN, by=verb), verb


def test_the_page_of_slots_says_what_is_returned_and_nothing_else():
    adata = section(radius=3)
    tl.neurtv_fit(adata, **(QUICK | {"penalty": ["nuclear", "gaussian_process"]}))
    returned = set()
    for out in (tl.neurtv_superres(adata), tl.neurtv_query(adata, adata.obsm["spatial"])):
        assert list(out.var) == list(adata.var)
        returned |= {s for s in as_page(slots_of(out), "neurtv") if s[0] != "var"}
    assert returned == set(re.findall(r'^\| `(\w+)\["(.+?)"\]`', RETURNED, re.M))


# ---- docs/api.md


def test_the_page_of_the_api_names_everything_that_is_public():
    page = (DOCS / "api.md").read_text()
    public = [*VERBS, *(f"neurst.imaging.{name}" for name in imaging.__all__ if name not in ("metrics",))]
    assert not [name for name in public if name not in page]
    assert "neurst.imaging.metrics" in page
    assert [
        name
        for name in dir(metrics)
        if not name.startswith("_")
        and inspect.isfunction(getattr(metrics, name))
        and not inspect.getdoc(getattr(metrics, name))
    ] == []
    for name in re.findall(r"auto(?:function|class|module):: ([\w.]+)", page):
        *parts, last = name.split(".")
        module = __import__(".".join(parts), fromlist=[last])
        assert hasattr(module, last) or __import__(name, fromlist=["_"]), name


def test_the_package_says_its_version():
    assert re.match(r"\d+\.\d+", neurst.__version__)
