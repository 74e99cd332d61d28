"""How far a field can be trusted on these data: held-out scores of it and of simpler methods."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from neurst.core.nets import Network
from neurst.spatial import baselines as methods
from neurst.spatial import door, holdout, slots
from neurst.spatial.fitting import fit_expression
from neurst.spatial.problem import Problem
from neurst.tl._neurtv import default_model
from neurst.tl._options import check_device, check_options, check_whole, progress_bar

OnStep = Callable[[int, int, str], None]
Route = Callable[[Problem, Problem, OnStep], tuple[NDArray, float]]  # (train, test) -> (M, G) prediction and its lam
BAR = 100  # steps of the progress bar for each method


def holdout_score(
    adata: AnnData,
    *,
    mode: Literal["random", "block"] = "random",
    fraction: float = 0.2,
    seeds: Sequence[int] = (0,),
    baselines: Sequence[str] = ("nearest", "kernel"),
    genes: Sequence[str] | str | None = None,
    layer: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    likelihood: Literal["auto", "poisson", "negative_binomial", "gaussian"] = "auto",
    size_factors: str | Sequence[float] | None = None,
    penalty: str | Sequence[str] = "auto",
    lam: float | Literal["auto"] = "auto",
    rank: int = 20,
    network: str | Network = "auto",
    steps: int | Literal["auto"] = "auto",
    n_members: int = 2,
    for_gaps: bool | None = None,
    device: str = "auto",
    key_added: str = "holdout_score",
    progress: bool = True,
) -> None:
    r"""Score a field on spots hidden from it, beside simpler methods that saw the same spots.

    .. math::
        1 - \frac{D(y, t\, \hat p)}{D(y, t\, \bar p)}, \qquad D(y, \mu) = \sum_{ig} 2\, (y \log (y / \mu) - y + \mu)

    is the share of the Poisson deviance of held-out counts y that rates :math:`\hat p` explain, t being library sizes and
    :math:`\bar p` the mean rates of the training spots: 0 is no better than the mean. For normalised values it is the share of
    variance, every gene scaled to unit variance. Each method chooses its settings, `lam` included, from the training spots alone.

    Parameters
    ----------
    adata
        One section, as for :func:`neurtv_fit`.
    mode
        ``"random"`` hides spots one by one, ``"block"`` whole discs: how well are gaps filled?
    fraction
        Share of the fitted spots to hide.
    seeds
        One split, and one fit of each method, for each.
    baselines
        Any of ``"nearest"`` and ``"kernel"`` (nearest spot and Gaussian kernel, shrunk to the mean), ``"kriging"`` (of Pearson
        residuals; of values, for normalised data; at most 4,500 training spots), and ``"no_tv"``, the same network with
        ``lam=0``. For counts also ``"kriging_log"`` and ``"lognorm"``, kriging of and the same network on log1p-normalised counts (its `lam` is
        always chosen), and ``"smoother"`` :cite:p:`Su2023`, which needs the package `smoother-omics`.
    genes, layer, spatial_key, library_key, likelihood, size_factors, penalty, lam, rank, network, steps, n_members, device
        As in :func:`neurtv_fit`.
    for_gaps
        As there; None is True in mode ``"block"``.
    key_added
        Name of the results.
    progress
        Show a progress bar. An interrupt leaves `adata` as it was.

    Returns
    -------
    None, and writes

    ``uns[key]`` : DataFrame
        A row for each seed and method, ``"field"`` among them. ``mode``, ``seed``, ``method``; ``score``, the share explained, all
        genes together; ``median_r``, the median over genes of the correlation with the measured log-rates; ``seconds`` to fit and
        predict; ``n_train``, ``n_test``; ``lam`` in nats, of the penalty of the largest weight, NaN for methods without.
    ``var[key]`` : float
        Share explained by the field, mean over seeds. 0 for a gene that is constant in the training spots or without counts in the
        held-out ones; NaN for genes that were not fitted.
    ``var["<key>_baseline"]`` : float
        The same for the baseline of the best mean score. NaN if there is none.

    Raises
    ------
    KeyError, ValueError
        As :func:`neurtv_fit`; and if a baseline is unknown or does not suit the data, or a split leaves too few spots. `adata`
        is then unchanged.
    ImportError
        If a baseline needs a package that is not installed.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.holdout_score(adata, lam=400, steps=20, progress=False)
    >>> list(adata.uns["holdout_score"]["method"])
    ['nearest', 'kernel', 'field']
    """
    slots.check_score_key(adata, key_added)
    for_gaps = mode == "block" if for_gaps is None else for_gaps
    check_options(likelihood, lam, for_gaps)
    seeds = (seeds,) if isinstance(seeds, Integral) else tuple(seeds)
    check_whole(1, rank=rank, n_members=n_members, **({} if steps == "auto" else {"steps": steps}))
    for seed in seeds:
        check_whole(0, seeds=seed)
    check_device(device)
    options = {
        "penalty": penalty,
        "network": network,
        "rank": rank,
        "n_members": n_members,
        "steps": steps,
        "device": device,
    }
    default_model(0, **options)  # what is wrong with them is said before a matrix is read
    reading = door.read(
        adata,
        genes=genes,
        layer=layer,
        spatial_key=spatial_key,
        library_key=library_key,
        likelihood=likelihood,
        size_factors=size_factors,
        footprint=None,
    )
    names = _known_methods(baselines, reading.likelihood)
    splits = {int(seed): _split(reading.problem, mode, int(seed), fraction) for seed in seeds}
    if not splits:
        raise ValueError(f"`seeds={seeds!r}` is empty: name at least one, e.g. (0, 1, 2)")
    fit = _Fit(reading.likelihood, lam, bool(for_gaps), options)
    with progress_bar(BAR * len(seeds) * (len(names) + 1), progress) as on_step:
        rows = list(_rows(splits, names, fit, on_step))
    slots.write_scores(adata, key_added, reading=reading, rows=[{"mode": mode} | row for row in rows])


@dataclass(frozen=True, eq=False)
class _Fit:
    """The field that is judged: how it is fitted, whatever the spots."""

    likelihood: str
    lam: float | Literal["auto"]
    for_gaps: bool
    options: Mapping[str, Any]  # of the model, as of :func:`neurtv_fit`

    def __call__(self, train: Problem, test: Problem, on_step: OnStep) -> tuple[NDArray, float]:
        """(M, G) rates or means at the test spots, and the `lam` of the penalty of the largest weight."""
        model = dataclasses.replace(default_model(len(train.coords), **self.options), likelihood=self.likelihood)
        fitted = fit_expression(train, model, lam=self.lam, for_gaps=self.for_gaps, on_step=on_step)
        return fitted.field(test.coords), float(fitted.lam[np.argmax(fitted.weights)])

    def of_logs(self, train: Problem, test: Problem, on_step: OnStep) -> tuple[NDArray, float]:
        """The same of log1p-normalised counts under a Gaussian likelihood, turned into rates."""
        logs = Problem(train.coords, methods.log_normalised(train.values, train.size), None, train.genes)
        fit = dataclasses.replace(self, likelihood="gaussian", lam="auto")  # a strength for counts does not carry over
        predicted, lam = fit(logs, test, on_step)
        return methods.rate_of_logs(predicted, train.null()), lam


def _routes(fit: _Fit) -> dict[str, Route]:
    """Every method by name, those that can refuse the data first."""
    counts = fit.likelihood != "gaussian"
    simple = {name: partial(_simple, name) for name in (methods.BASELINES if counts else methods.MEANS)}
    logs = {"lognorm": fit.of_logs} if counts else {}
    return simple | {"field": fit, "no_tv": dataclasses.replace(fit, lam=0.0)} | logs


def _simple(name: str, train: Problem, test: Problem, on_step: OnStep) -> tuple[NDArray, float]:
    """A baseline that is not a network."""
    if train.size is None:
        return methods.MEANS[name](train.coords, train.values, test.coords), np.nan
    return methods.BASELINES[name](train.coords, train.values, train.size, test.coords, test.size), np.nan


def _known_methods(baselines: Sequence[str] | str, likelihood: str) -> list[str]:
    """The names, each once, if all are methods for this kind of data."""
    names = [baselines] if isinstance(baselines, str) else list(dict.fromkeys(baselines))
    counts = likelihood != "gaussian"
    known = [*methods.BASELINES, "no_tv", "lognorm"] if counts else [*methods.MEANS, "no_tv"]
    for name in names:
        if name not in known:
            kind = "counts" if counts else "normalised values"
            raise ValueError(f"`baselines`: {name!r} is no method for {kind}: choose from {known}")
    return names


@dataclass(frozen=True, eq=False)
class _Split:
    train: Problem
    test: Problem
    genes: NDArray  # those of the whole problem that hold something to fit in the training spots
    n_genes: int  # of the whole problem


def _split(problem: Problem, mode: str, seed: int, fraction: float) -> _Split:
    train, test = holdout.split(problem.coords, mode, random_state=seed, fraction=fraction)
    if len(test) == 0 or len(train) < 4:
        msg = (
            f"`fraction={fraction!r}` hides {len(test)} of {len(problem.coords)} spots and leaves {len(train)} to learn from: expected at "
            "least 1 and 4; pass another `fraction`"
        )
        raise ValueError(msg)
    genes = problem.take(train).active()
    if len(genes) == 0:
        msg = f"none of the {len(problem.genes)} genes varies between the {len(train)} training spots: check `layer` and `genes`"
        raise ValueError(msg)
    return _Split(problem.take(train, genes), problem.take(test, genes), genes, len(problem.genes))


def _rows(splits: dict[int, _Split], names: list[str], fit: _Fit, on_step: OnStep) -> Iterator[dict]:
    """Scores of every method for every seed; baselines that can refuse the data come before fits that take their time."""
    done = 0
    for seed, split in splits.items():
        seeded = dataclasses.replace(fit, options={**fit.options, "random_state": seed})
        for name, route in _routes(seeded).items():
            if name == "field" or name in names:
                at = partial(_part_of_bar, on_step, done, f"seed {seed}, {name}")
                at(0, 1, "")
                yield {"seed": seed, "method": name} | _score(split, route, at)
                done += BAR
                on_step(done, done, name)


def _part_of_bar(on_step: OnStep, begin: int, label: str, done: int, planned: int, stage: str) -> None:
    on_step(begin + BAR * done // planned, begin + BAR, f"{label}: {stage}" if stage else label)


def _score(split: _Split, route: Route, on_step: OnStep) -> dict:
    """One method on one split: figures of its row, and ``gene_scores`` (G,)."""
    train, test = split.train, split.test
    begin = time.perf_counter()
    predicted, lam = route(train, test, on_step)
    seconds = time.perf_counter() - begin
    if train.size is None:
        arguments = (test.values, predicted, train.null())
        score, per_gene = holdout.variance_explained(*arguments), holdout.variance_explained_per_gene(*arguments)
    else:
        arguments = (test.values, test.size, predicted, train.null())
        score, per_gene = holdout.deviance_explained(*arguments), holdout.deviance_explained_per_gene(*arguments)
    gene_scores = np.zeros(split.n_genes)
    gene_scores[split.genes] = per_gene
    return {
        "score": score,
        "median_r": holdout.median_gene_correlation(test.values, test.size, predicted),
        "seconds": seconds,
        "n_train": len(train.coords),
        "n_test": len(test.coords),
        "lam": float(lam),
        "gene_scores": gene_scores,
    }
