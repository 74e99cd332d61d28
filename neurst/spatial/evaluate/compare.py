"""Predicts hidden spots with a field and with simpler methods, all from the same training spots, and scores the predictions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurst.core.progress import OnProgress
from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.baselines import rate_of_logs
from neurst.spatial.evaluate.splits import Holdout, split
from neurst.spatial.fit import fit_expression
from neurst.spatial.observation import Normalised
from neurst.spatial.spec import ExpressionSpec

FIELD = "field"
UNITS = 100  # units of the progress bar for each method
MakeSpec = Callable[[int, int], ExpressionSpec]  # (number of training spots, seed) -> choices of the fit
# (train, test, on_progress) -> predictions (M, G), and the `lam` of the method
Predict = Callable[[SpotData, SpotData, OnProgress], tuple[NDArray, float]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Scores of all methods on all splits.

    Parameters
    ----------
    rows
        One for each seed and method: ``holdout``, ``seed``, ``method``, ``score``, ``median_r``, ``seconds``, ``n_train``, ``n_test``, ``lam``.
    per_gene
        (G,) scores of the genes, for each row.
    """

    rows: list[dict[str, Any]]
    per_gene: list[NDArray]

    def gene_scores(self, method: str | None) -> NDArray:
        """(G,) scores of a method, averaged over seeds; NaN if `method` is None."""
        found = [scores for row, scores in zip(self.rows, self.per_gene, strict=True) if row["method"] == method]
        return np.mean(found, axis=0) if found else np.full(len(self.per_gene[0]), np.nan)

    def best_baseline(self) -> str | None:
        """As in :func:`best_baseline`."""
        return best_baseline([(row["method"], row["score"]) for row in self.rows])


def best_baseline(scores: Sequence[tuple[str, float]]) -> str | None:
    """The method with the best mean score besides the field; None if there is no other."""
    names = sorted({method for method, _ in scores if method != FIELD})
    return max(names, key=lambda name: np.mean([score for method, score in scores if method == name]), default=None)


def known_methods(data: SpotData) -> list[str]:
    """Names of the methods other than the field for this kind of data."""
    return [*data.observation.baselines, *data.observation.variants]


def compare(
    data: SpotData,
    make_spec: MakeSpec,
    methods: Sequence[str],
    *,
    seeds: Sequence[int],
    holdout: Holdout,
    fraction: float,
    on_progress: OnProgress,
) -> Comparison:
    """Hide spots, predict them with the field and with `methods`, and score the predictions.

    Parameters
    ----------
    data
        Spots and genes.
    make_spec
        Gives the choices of a fit for a number of training spots and a seed.
    methods
        Names among :func:`known_methods`.
    seeds
        Seeds of the splits and fits.
    holdout, fraction
        As in :func:`neurst.spatial.evaluate.splits.split`.
    on_progress
        Called with the units done, the units planned, and the name of the current stage.

    Raises
    ------
    ValueError
        If a method is unknown, or a split leaves too few spots.
    """
    known = known_methods(data)
    for name in methods:
        if name not in known:
            msg = f"`baselines`: {name!r} is no method for {data.observation.kind}: expected some of {known}"
            raise ValueError(msg)
    splits = {seed: _split(data, holdout, seed, fraction) for seed in seeds}
    progress = _Units(on_progress, UNITS * len(splits) * (len(methods) + 1))
    found = [
        row
        for seed, part in splits.items()
        for row in _score_all(part, partial(make_spec, seed=seed), methods, seed, progress)
    ]
    return Comparison([{"holdout": holdout} | row for row, _ in found], [scores for _, scores in found])


@dataclass(frozen=True, eq=False)
class _Split:
    train: SpotData
    test: SpotData
    genes: NDArray  # indices of the genes that can be fitted to the training spots
    n_genes: int  # number of all genes


@dataclass(eq=False)
class _Units:
    """Progress in units; every method has the same number of units."""

    on_progress: OnProgress
    planned: int
    done: int = 0

    def within(self, label: str, done: int, planned: int, stage: str) -> None:
        """Report the progress of one method, given in steps of that method."""
        text = f"{label}: {stage}" if stage else label
        self.on_progress(self.done + UNITS * done // max(planned, 1), self.planned, text)


def _split(data: SpotData, holdout: Holdout, seed: int, fraction: float) -> _Split:
    train, test = split(data.coords, holdout, random_state=seed, fraction=fraction)
    if len(test) == 0 or len(train) < 4:
        msg = (
            f"`fraction={fraction!r}` hides {len(test)} of {len(data.coords)} spots and leaves {len(train)} to learn from: expected at "
            "least 1 and 4; pass another `fraction`, or more spots"
        )
        raise ValueError(msg)
    spread = np.linalg.svd(data.coords[train] - data.coords[train].mean(0), compute_uv=False)
    if spread[-1] < 1e-9 * spread[0]:
        msg = f"the {len(train)} spots that `fraction={fraction!r}` and seed {seed} leave lie on a line: pass another seed, or more spots"
        raise ValueError(msg)
    genes = data.take(train).informative_genes()
    if len(genes) == 0:
        msg = f"none of the {len(data.genes)} genes varies between the {len(train)} training spots: check `layer` and `genes`"
        raise ValueError(msg)
    return _Split(data.take(train, genes), data.take(test, genes), genes, len(data.genes))


def _score_all(
    part: _Split, make_spec: Callable[[int], ExpressionSpec], methods: Sequence[str], seed: int, progress: _Units
) -> Iterator[tuple[dict[str, Any], NDArray]]:
    """Scores of all methods on one split. Simple methods come first, because some of them can refuse the data."""
    observation = part.train.observation
    simple = {name: partial(_simple, predict) for name, predict in observation.baselines.items()}
    fitted: dict[str, Predict] = {
        FIELD: partial(_by_field, make_spec),
        "no_tv": partial(_by_field, lambda n: make_spec(n).without_penalty()),
        "lognorm": partial(_by_field_of_logs, lambda n: dataclasses.replace(make_spec(n), lam=None)),
    }
    for name, predict in (simple | fitted).items():
        if name == FIELD or name in methods:
            label = f"seed {seed}, {name}"
            progress.within(label, 0, 1, "")
            yield _score(part, predict, partial(progress.within, label), {"seed": seed, "method": name})
            progress.done += UNITS
            progress.within(label, 0, 1, "")


def _simple(predict: Callable, train: SpotData, test: SpotData, on_progress: OnProgress) -> tuple[NDArray, float]:
    """Predictions of a method without a network, and NaN in place of its `lam`."""
    return predict(train, test), np.nan


def _by_field(
    make_spec: Callable[[int], ExpressionSpec], train: SpotData, test: SpotData, on_progress: OnProgress
) -> tuple[NDArray, float]:
    """Predicted rates or values of a field, and the `lam` of the network with the largest weight, NaN if there is none."""
    spec = make_spec(len(train.coords))
    result = fit_expression(train, spec, target_sum=1.0, on_progress=on_progress)
    networks = [candidate.network is not None for candidate in spec.candidates()]
    best = np.argmax(np.where(networks, result.tuning.weights, -1.0))
    return result.field(test.coords), float(result.tuning.lam[best]) if any(networks) else np.nan


def _by_field_of_logs(
    make_spec: Callable[[int], ExpressionSpec], train: SpotData, test: SpotData, on_progress: OnProgress
) -> tuple[NDArray, float]:
    """As :func:`_by_field`, for a field of log-normalised counts with a Gaussian likelihood; its values are converted to rates."""
    logs = SpotData(train.coords, train.observation.normalised(train.values), train.genes, Normalised())
    predicted, lam = _by_field(make_spec, logs, test, on_progress)
    return rate_of_logs(predicted, train.mean_rate()), lam


def _score(
    part: _Split, predict: Predict, on_progress: OnProgress, row: dict[str, Any]
) -> tuple[dict[str, Any], NDArray]:
    """A row of the table, and the scores of all genes (G,)."""
    train, test = part.train, part.test
    begin = time.perf_counter()
    predicted, lam = predict(train, test, on_progress)
    seconds = time.perf_counter() - begin
    rate, gene_scores = train.mean_rate(), np.zeros(part.n_genes)
    gene_scores[part.genes] = test.observation.gene_scores(test.values, predicted, rate)
    figures = {
        "score": test.observation.score(test.values, predicted, rate),
        "median_r": test.observation.correlation(test.values, predicted),
        "seconds": seconds,
        "n_train": len(train.coords),
        "n_test": len(test.coords),
        "lam": lam,
    }
    return row | figures, gene_scores
