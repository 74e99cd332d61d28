"""Held-out scores of a field and of simpler methods: how far the field can be trusted on these data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from anndata import AnnData

from neurst.core.arguments import NONE, SEED, TEXT, checked, number, one_of, several
from neurst.core.nets import Network
from neurst.core.progress import progress_bar
from neurst.core.tuning import LineSearch
from neurst.spatial.adata import keys, read, write
from neurst.spatial.evaluate.compare import compare
from neurst.spatial.priors import Prior
from neurst.spatial.spec import ExpressionConfig, specify
from neurst.tl._fit import FIT_RULES

SHARED = {name: rule for name, rule in FIT_RULES.items() if name != "random_state"}


@checked(
    holdout=one_of("random", "block"),
    fraction=number(0, 0.95, above=True),
    seeds=several(SEED),
    baselines=NONE | several(TEXT, least=0),
    **SHARED,
)
def holdout_score(
    adata: AnnData,
    *,
    holdout: Literal["random", "block"] = "random",
    fraction: float = 0.2,
    seeds: Sequence[int] | int = (0,),
    baselines: Sequence[str] | str | None = ("nearest", "kernel"),
    genes: Sequence[str] | str | None = None,
    layer: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    likelihood: Literal["auto", "poisson", "negative_binomial", "gaussian"] = "auto",
    size_factors: str | Sequence[float] | None = None,
    penalty: str | Prior | Sequence[str | Prior] = "auto",
    lam: float | Literal["auto"] = "auto",
    rank: int | Literal["auto"] = "auto",
    network: str | Network | Sequence[str | Network] = "auto",
    n_members: int = 2,
    steps: int | Literal["auto"] = "auto",
    search: LineSearch = LineSearch(),
    config: ExpressionConfig = ExpressionConfig(),
    device: str = "auto",
    key_added: str = "holdout_score",
    progress: bool = True,
) -> None:
    r"""Score a field on spots that were hidden from it, and compare it with simpler methods that had the same training spots.

    .. math::
        1 - \frac{D(y, t\, \hat p)}{D(y, t\, \bar p)}, \qquad D(y, \mu) = \sum_{ig} 2\, (y \log (y / \mu) - y + \mu)

    is the share of the Poisson deviance of held-out counts y that rates :math:`\hat p` explain. Here t are library sizes and
    :math:`\bar p` the mean rates of the training spots: 0 is no better than the mean. For normalised values it is the share of the
    variance, with every gene scaled to unit variance. Each method chooses its settings, `lam` included, from the training spots alone.

    Parameters
    ----------
    adata
        One section, as for :func:`neurtv_fit`.
    holdout
        How spots are held out: ``"random"`` hides single spots, ``"block"`` hides discs of spots. The scores then
        measure predictions between neighbouring spots, or across wider gaps. The field itself always chooses its settings on both kinds of
        held-out spots, see :func:`neurtv_fit`.
    fraction
        Share of the fitted spots to hide.
    seeds
        Seeds: for each of them there is one split, and one fit of each method.
    baselines
        Methods to compare with. ``"nearest"`` and ``"kernel"`` are the nearest spot and a Gaussian kernel, shrunk to the mean. ``"kriging"`` is
        that of Pearson residuals, or of normalised values, with at most 4,500 training spots. ``"no_tv"`` is the networks alone with ``lam=0``,
        without a Gaussian process or the constant. For counts there are also ``"kriging_log"``, kriging of log1p-normalised counts; ``"lognorm"``, a
        field of these with the same settings (its `lam` is always chosen); and ``"smoother"`` :cite:p:`Su2023`, which needs the package
        `smoother-omics`. None compares with no other method.
    genes, layer, spatial_key, library_key, likelihood, size_factors
        As in :func:`neurtv_fit`.
    penalty, lam, rank, network, n_members, steps, search, config, device, progress
        As in :func:`neurtv_fit`.
    key_added
        Name under which results are stored.

    Returns
    -------
    None, and writes

    ``uns[key]`` : DataFrame
        A row for each seed and method, including ``"field"``. Columns: ``holdout``, ``seed``, ``method``; ``score``, the share explained, all
        genes together; ``median_r``, the median over genes of the correlation with the measured log-rates; ``seconds`` to fit and
        predict; ``n_train``, ``n_test``; ``lam`` in nats, of the network with the largest weight, NaN for methods without a network.
    ``var[key]`` : float
        Share explained by the field, mean over seeds. 0 for a gene that is constant in the training spots or without counts in the
        held-out ones; NaN for genes that were not fitted.
    ``var["<key>_baseline"]`` : float
        The same for the baseline with the best mean score. NaN if there is none.

    Raises
    ------
    KeyError, TypeError, ValueError
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
    keys.check_name(key_added)
    write.check_score_key(adata, key_added)
    options = {"penalty": penalty, "network": network, "rank": rank, "n_members": n_members, "lam": lam, "steps": steps}
    options |= {"search": search, "config": config, "device": device}
    specify(0, **options)  # raises for invalid options before a matrix is read
    measured = read.read_spots(adata, genes, layer, spatial_key, library_key, likelihood, size_factors)
    with progress_bar(progress) as on_progress:
        comparison = compare(
            measured.data,
            lambda n_spots, seed: specify(n_spots, measured.data.coords.shape[1], random_state=seed, **options),
            list(dict.fromkeys(baselines or ())),
            seeds=list(dict.fromkeys(seeds)),
            holdout=holdout,
            fraction=fraction,
            on_progress=on_progress,
        )
    write.write_scores(adata, key_added, measured=measured, comparison=comparison)
