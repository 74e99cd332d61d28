"""Expression between the spots: fit a NeurTV field."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from neurst.core.arguments import (
    ANYTHING,
    AUTO,
    FLAG,
    LAM,
    MEMBERS,
    NAMES,
    NONE,
    POSITIVE,
    SEED,
    SIZE,
    TEXT,
    checked,
    instance,
    one_of,
)
from neurst.core.fit import DEVICE
from neurst.core.nets import Network
from neurst.core.progress import progress_bar
from neurst.core.tuning import SEARCH, LineSearch
from neurst.spatial.adata import keys, read, write
from neurst.spatial.field import ExpressionField
from neurst.spatial.fit import fit_expression
from neurst.spatial.matrix import spot_chunks
from neurst.spatial.priors import Prior
from neurst.spatial.spec import ExpressionConfig, specify

log = logging.getLogger("neurst")
FIT_RULES = {
    "adata": read.ADATA,
    "genes": (NONE | NAMES).advised("None takes all genes"),
    "layer": (NONE | TEXT).advised("the name of a layer; None for X"),
    "spatial_key": TEXT,
    "library_key": (NONE | TEXT).advised("a column of `obs`"),
    "likelihood": one_of("auto", *read.LIKELIHOODS),
    "size_factors": ANYTHING,
    "penalty": ANYTHING,
    "lam": LAM,
    "rank": AUTO | SIZE,
    "network": ANYTHING,
    "n_members": MEMBERS,
    "steps": AUTO | SIZE,
    "search": SEARCH,
    "config": instance(ExpressionConfig, "a `neurst.spatial.spec.ExpressionConfig`"),
    "device": DEVICE,
    "random_state": SEED,
    "key_added": TEXT,
    "progress": FLAG,
}


@checked(
    footprint=(NONE | AUTO | POSITIVE).advised("the diameter of a spot in the units of the coordinates"), **FIT_RULES
)
def neurtv_fit(
    adata: AnnData,
    *,
    genes: Sequence[str] | str | None = None,
    layer: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    likelihood: Literal["auto", "poisson", "negative_binomial", "gaussian"] = "auto",
    size_factors: str | Sequence[float] | None = None,
    footprint: float | Literal["auto"] | None = None,
    penalty: str | Prior | Sequence[str | Prior] = "auto",
    lam: float | Literal["auto"] = "auto",
    rank: int | Literal["auto"] = "auto",
    network: str | Network | Sequence[str | Network] = "auto",
    n_members: int = 2,
    steps: int | Literal["auto"] = "auto",
    search: LineSearch = LineSearch(),
    config: ExpressionConfig = ExpressionConfig(),
    device: str = "auto",
    random_state: int = 0,
    key_added: str = "neurtv",
    progress: bool = True,
) -> None:
    r"""Fit a continuous expression field to the spots of one section.

    .. math::
        y_{ig} \sim \mathrm{Poisson}\big(t_i \exp(b_g + V_g \cdot z(x_i))\big), \qquad
        \min_{z, V, b} \; -\log p(y) + \lambda \, \mathrm{mean}_x\, P(z)(x) + \tfrac12 \|V\|_F^2

    Here z is a coordinate network with `rank` latent channels, V are gene loadings, :math:`t_i` is the library size and P a total variation of
    z from its exact derivatives (NeurTV :cite:p:`Luo2025`). For normalised data the link is the identity and the noise Gaussian, with one
    scale for each gene.

    The field is a weighted mean, on the scale of the predictor (the log-rate, for counts), of such networks, of a Gaussian process
    (:mod:`neurst.spatial.gaussian_process`), and of the mean rate of each gene. First, about 20 % of the spots are held out, half of them single
    spots and half of them in discs. They decide on the prior strength of each member and on the weights, and they score each gene. Then the
    members are fitted to all spots. z and V are fitted to the 1,000 most variable genes; the loadings of further genes are solved for on z.

    Parameters
    ----------
    adata
        One section: positions in ``obsm[spatial_key]`` (2-d or 3-d, any unit), expression in `X` or `layer`.
    genes
        Names of genes; None takes all.
    layer
        Layer to fit; `X` if None.
    spatial_key
        Key of the positions in `obsm`.
    library_key
        Column of `obs` that names the section of each spot; all spots must be of one section. If it is given, nothing else is checked
        for several sections.
    likelihood
        ``"auto"`` is Poisson if the matrix holds whole numbers >= 0, else Gaussian.
    size_factors
        Library sizes, an array (n_obs,) or a column of `obs`; None takes totals over *all* genes of the layer.
    footprint
        Diameter of a spot, in the units of the coordinates. The rate of a spot is then the mean over a disc (a ball in 3-d), computed
        at 4 (6) points of it, and the field is sharper than the spots. None takes spots as points. ``"auto"`` is
        ``uns["spatial"][...]["scalefactors"]["spot_diameter_fullres"]``, else 0.55 of the pitch on a lattice (Visium); irregular
        positions are taken as points. The latent channels of the Gaussian process are always fitted to points.
    penalty
        Members of the average, one or several. A network is fitted with each total variation of its latent field: ``"nuclear"``
        (:class:`neurst.core.penalty.NuclearTV`: channels share their directions), ``"space_variant"``
        (:class:`neurst.core.penalty.SpaceVariantTV`: weaker at edges and across them), ``"isotropic"``, ``"anisotropic"``, ``"vectorial"``,
        ``"edge_weighted"``, ``"second_order"``, ``"hessian"``, ``"tgv"`` or ``"learned_tgv"`` (in two dimensions); or a penalty of :mod:`neurst.core.penalty`. Members without a network are
        ``"gaussian_process"`` (:class:`neurst.spatial.priors.GaussianProcess`), which also gives the standard deviation, and ``"constant"``, the mean
        rate of each gene. ``"auto"`` is nuclear, space-variant, Gaussian process and constant; on more than 20,000 spots it is without the
        space-variant penalty, to save time.
    lam
        Prior strength of the networks in nats (natural-log units of likelihood), or ``"auto"``: chosen by short fits that are scored on held-out
        spots. A good value hardly depends on the number of spots or genes; 20 to 3,000 suits most tissue. The strength of a Gaussian process is
        always chosen.
    rank
        Number of latent channels of a member, lowered if there are fewer spots or genes. Channels that the data do not support shrink to zero.
        ``"auto"`` is ``20 max(1, N / 5000)^(1/4)`` for N spots, at most 60.
    network
        ``"siren"``, ``"fourier"``, ``"lowrank"``, ``"spline"``, ``"cosine"``, or a specification such as ``neurst.core.nets.Siren(width=64)``; or
        several of them. The first is fitted with each penalty, the others with the first penalty only. ``"auto"`` is a SIREN whose finest scale follows the
        number N of spots, ``omega = 5 max(1, N / 5000)^(1/4)``, and on more than 5,000 spots also a cubic B-spline with about 3 spots (in 3-d: 5) in
        each of its finest cells.
    n_members
        Number of fits of networks to all spots. They cycle through the penalties and networks that have weight, with a new seed for each fit.
        A Gaussian process with weight is one member more.
    steps
        Optimisation steps of each final fit of a network; ``"auto"`` is 400. A spline takes at most 300.
    search
        Settings of the search for ``lam="auto"``.
    config
        Further numerical settings of the method.
    device
        ``"auto"`` is CUDA, else MPS, else the CPU; or the name of a torch device.
    random_state
        Seed of every draw: the same seed on the same machine gives the same numbers.
    key_added
        Name under which results are stored.
    progress
        Show a progress bar. An interrupt leaves `adata` as it was.

    Returns
    -------
    None, and writes

    ``layers[key]`` : (n_obs, n_vars) float32
        Expected expression at the spots (with a `footprint`: at their centres). For counts it is that at library size ``target_sum``, the median
        of the fitted spots; else in the units of the data. NaN for genes that were not fitted. If fewer than half of the genes were fitted, it is
        ``obsm[key]`` instead, a DataFrame of these genes.
    ``layers["<key>_std"]`` : (n_obs, n_vars) float32, if `penalty` includes a Gaussian process, as ``"auto"`` does
        Posterior standard deviation of the expected expression, in the same units; it grows with the distance to the spots. Counting noise is not
        part of it. It is also in `obsm` if few genes were fitted.
    ``obsm["X_<key>"]`` : (n_obs, r) float32
        Latent coordinates, centred, sorted by falling variance. r is at most `rank` times the number of members, the Gaussian process included;
        components below 1e-4 of the largest are dropped.
    ``varm["<key>_loadings"]`` : (n_vars, r) float32
        Orthonormal gene loadings.
    ``var["<key>_fitted"]``, ``var["<key>_empty"]`` : bool
        Genes that were fitted; fitted genes without counts (or without variation), which get their mean.
    ``var["<key>_deviance_explained"]``, for normalised data ``var["<key>_variance_explained"]`` : float
        Share of the Poisson deviance (of the variance) of held-out spots that is explained, where half of them are single spots and half are in
        discs: 0 is no better than the mean of the gene. Trust a gene between spots only if it is clearly positive.
    ``var["<key>_dispersion"]`` : float, for counts
        :math:`\phi_g` of the held-out counts, whose variance about the prediction is :math:`\mu + \phi_g \mu^2`.
    ``uns[key]`` : dict
        Parameters, versions, history, every `lam` that was tried with its score, the weight of each member, and the whole field as plain arrays.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, a key, layer or gene is unknown, positions are missing, not finite or degenerate, there seem to be several
        sections, or values do not suit the likelihood. `adata` is then unchanged.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> adata.layers["neurtv"].shape == adata.shape
    True
    """
    keys.check_name(key_added)
    options = {"penalty": penalty, "network": network, "rank": rank, "n_members": n_members, "lam": lam, "steps": steps}
    options |= {"search": search, "config": config, "device": device, "random_state": random_state}
    specify(0, **options)  # raises for invalid options before a matrix is read
    measured = read.read_spots(adata, genes, layer, spatial_key, library_key, likelihood, size_factors, footprint)
    data = measured.data
    spec = specify(*data.coords.shape, **options)
    slots = write.fit_slots(key_added, len(data.genes), adata.n_vars, data.observation, std=spec.has_spread)
    write.check_fit_key(adata, key_added, slots)
    with progress_bar(progress) as on_progress:
        result = fit_expression(data, spec, on_progress=on_progress)
    score_name, tuning = data.observation.score_name.replace("_", " "), result.tuning
    log.info("lam=%s; held-out %s %.3f", np.round(tuning.lam), score_name, tuning.score)
    tables = _fit_tables(result.field, measured.coords, key_added, adata.n_vars)
    arguments = {
        "layer": layer,
        "spatial_key": spatial_key,
        "library_key": library_key,
        "likelihood": measured.likelihood,
        "size_factors": measured.size_factors,
        "footprint": data.footprint,
        "some_genes": None if genes is None else True,
    }
    write.write_fit(adata, key_added, measured=measured, result=result, spec=spec, tables=tables, arguments=arguments)


def _fit_tables(field: ExpressionField, coords: NDArray, key: str, n_vars: int) -> write.FitTables:
    """Values of a field at the spots, without tables that would be too large."""
    values = std = None
    if write.fits(key, len(coords), len(field.genes), n_vars):
        values, std = evaluate(field, coords)
    return write.FitTables(values, std, field.latent(coords).astype(np.float32))


def evaluate(field: ExpressionField, coords: NDArray) -> tuple[NDArray, NDArray | None]:
    """Expected expression (N, G), and its standard deviation if a Gaussian process is among the members; float32."""

    def by_chunks(function: Callable) -> NDArray:  # only a chunk at a time is in float64
        out = np.empty((len(coords), len(field.genes)), dtype=np.float32)
        for rows in spot_chunks(*out.shape):
            out[rows] = function(coords[rows])
        return out

    return by_chunks(field), by_chunks(field.std) if has_std(field) else None


def has_std(field: ExpressionField) -> bool:
    return field.spread is not None
