"""Expression between the spots: fit a NeurTV field, and evaluate it anywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

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
    coordinates,
    instance,
    one_of,
    warn,
)
from neurst.core.fit import DEVICE
from neurst.core.nets import Network
from neurst.core.penalty import Penalty
from neurst.core.progress import progress_bar
from neurst.core.tuning import SEARCH, LineSearch
from neurst.spatial.adata import keys, read, results, write
from neurst.spatial.adata.serialise import StoredFit, stored_fit
from neurst.spatial.field import ExpressionField
from neurst.spatial.fit import fit_expression
from neurst.spatial.matrix import spot_chunks
from neurst.spatial.spec import ExpressionConfig, specify
from neurst.spatial.support import LATTICES, Support, TooManyPoints, support_of

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
    "holdout": one_of("random", "block"),
    "rank": SIZE,
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
BYTES_OF_OBS = 90  # of a point: its name in `obs_names`, and the columns of `obs`
LENGTH = (NONE | POSITIVE).advised("a distance in the units of the coordinates")


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
    penalty: str | Penalty | Sequence[str | Penalty] = "auto",
    lam: float | Literal["auto"] = "auto",
    holdout: Literal["random", "block"] = "random",
    rank: int = 20,
    network: str | Network = "auto",
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
    scale for each gene. The field is the mean, on the scale of the predictor, of `n_members` such fits that differ in penalty and seed.
    20 % of the spots are held out to choose `lam` for each penalty, to weigh the penalties, and to score each gene; then the members
    are fitted to all spots. z and V are fitted to the 1,000 most variable genes; the loadings of further genes are solved for on z.

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
        positions are taken as points.
    penalty
        Regulariser of the latent field: ``"nuclear"`` (:class:`neurst.core.penalty.NuclearTV`: channels share their directions),
        ``"space_variant"`` (:class:`neurst.core.penalty.SpaceVariantTV`: weaker at edges and across them), ``"isotropic"``,
        ``"anisotropic"``, ``"vectorial"``, ``"edge_weighted"``, ``"second_order"``, ``"hessian"`` or ``"tgv"``; a penalty of
        :mod:`neurst.core.penalty`; or several of them, to be averaged. ``"auto"`` is the first two. Both are fitted, and held-out spots decide how
        much weight each gets.
    lam
        Prior strength in nats (natural-log units of likelihood), or ``"auto"``: chosen by short fits that are scored on held-out spots. A good
        value hardly depends on the number of spots or genes; 20 to 3,000 suits most tissue.
    holdout
        How spots are held out: ``"random"`` hides single spots, ``"block"`` hides discs of spots. The choices and
        scores of a fit then refer to predictions between neighbouring spots, or across wider gaps.
    rank
        Number of latent channels of a member, lowered if there are fewer spots or genes. Channels that the data do not support shrink to zero.
    network
        ``"siren"``, ``"fourier"``, ``"lowrank"``, ``"spline"``, or a specification such as ``neurst.core.nets.Siren(width=64)``. ``"auto"`` is a SIREN
        whose finest scale follows the number of spots, ``omega = 5 max(1, N / 5000)^(1/4)``.
    n_members
        Number of fits that are averaged; they cycle through the penalties. With 4 or more, the standard deviation between them is stored.
    steps
        Optimisation steps of each final fit; ``"auto"`` is ``500 max(1, N / 5000)^(1/4)``.
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
    ``layers["<key>_std"]`` : (n_obs, n_vars) float32, if ``n_members >= 4``
        Standard deviation of the expected expression between members, in the same units; also in `obsm` if few genes were fitted.
    ``obsm["X_<key>"]`` : (n_obs, r) float32
        Latent coordinates, centred, sorted by falling variance. r is at most ``rank * n_members``; components below 1e-4 of the largest are dropped.
    ``varm["<key>_loadings"]`` : (n_vars, r) float32
        Orthonormal gene loadings.
    ``var["<key>_fitted"]``, ``var["<key>_empty"]`` : bool
        Genes that were fitted; fitted genes without counts (or without variation), which get their mean.
    ``var["<key>_deviance_explained"]``, for normalised data ``var["<key>_variance_explained"]`` : float
        Share of the Poisson deviance (of the variance) of held-out spots that is explained: below 0 is worse than the
        mean of the gene. Trust a gene between spots only if it is clearly positive.
    ``var["<key>_dispersion"]`` : float, for counts
        :math:`\phi_g` of the held-out counts, whose variance about the prediction is :math:`\mu + \phi_g \mu^2`.
    ``uns[key]`` : dict
        Parameters, versions, history, every `lam` that was tried with its score, and the whole field as plain arrays.

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
    options |= {"search": search, "config": config, "device": device, "holdout": holdout, "random_state": random_state}
    specify(0, **options)  # raises for invalid options before a matrix is read
    measured = read.read_spots(adata, genes, layer, spatial_key, library_key, likelihood, size_factors, footprint)
    data = measured.data
    slots = write.fit_slots(key_added, len(data.genes), adata.n_vars, data.observation, n_members)
    write.check_fit_key(adata, key_added, slots)
    spec = specify(len(data.coords), **options)
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
        values, std = _evaluate(field, coords)
    return write.FitTables(values, std, field.latent(coords).astype(np.float32))


def _evaluate(field: ExpressionField, coords: NDArray) -> tuple[NDArray, NDArray | None]:
    """Expected expression (N, G), and its standard deviation if there are enough members; float32."""

    def by_chunks(function: Callable) -> NDArray:  # only a chunk at a time is in float64
        out = np.empty((len(coords), len(field.genes)), dtype=np.float32)
        for rows in spot_chunks(*out.shape):
            out[rows] = function(coords[rows])
        return out

    return by_chunks(field), by_chunks(field.std) if _has_std(field) else None


@checked(
    adata=read.ADATA,
    factor=POSITIVE,
    spacing=LENGTH,
    lattice=one_of(*dict.fromkeys(LATTICES[2] + LATTICES[3])),
    support_radius=LENGTH,
    genes=FIT_RULES["genes"],
    key=read.KEY,
    max_gb=POSITIVE,
    progress=FLAG,
)
def neurtv_superres(
    adata: AnnData,
    *,
    factor: float = 2,
    spacing: float | None = None,
    lattice: Literal["auto", "hexagonal", "square", "cubic"] = "auto",
    support_radius: float | None = None,
    genes: Sequence[str] | str | None = None,
    key: str = "neurtv",
    max_gb: float = 8.0,
    progress: bool = True,
) -> AnnData:
    """Expression on a dense lattice inside the tissue, as a new AnnData.

    Evaluates the field stored under ``uns[key]``. If there is none, :func:`neurtv_fit` is called with its defaults first, so `adata`
    then also holds the fit. But if there are fits under other names only, a `key` other than the default is an error.

    Parameters
    ----------
    adata
        One section, or some of its spots: the lattice fills the tissue around these spots.
    factor
        The spacing of the lattice is the spot pitch divided by this: 2 gives about four times the spots in 2-d. In a stack of sections (3-d
        positions with few distinct heights) the distances between sections are divided by it as well.
    spacing
        Spacing in the units of the coordinates, instead of `factor`.
    lattice
        ``"auto"`` is hexagonal if the spots are, else square; cubic in 3-d. If the spots form such a lattice, the new one is aligned with it.
    support_radius
        Points within this distance of a measured spot are tissue. If None, 1.05 pitch on lattices (one missing spot is filled, a
        larger hole is not), else the 99th percentile of the distance to the third neighbour. In a stack this applies within a section. Between two
        sections the shape of the tissue is interpolated; there is no tissue above the top or below the bottom section.
    genes
        Names of genes; None takes all. Only fitted genes have a field.
    key
        Name of the fit.
    max_gb
        Largest size of the result in GB; an error is raised before a larger one is built.
    progress
        Show a progress bar. It is shown only if a fit is needed.

    Returns
    -------
    AnnData
        ``X`` (float32): expected expression, for counts at library size ``uns[key]["field"]["target_sum"]``. ``var`` with its columns,
        ``obsm["spatial"]``, ``obs["distance_to_spot"]``, ``obs["in_support"]``, ``uns["spatial"]`` copied with the spot diameter
        adjusted, and ``uns[key]`` with the field, so that the result can be queried and differentiated.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, there is no fit under a `key` other than the default, `factor` and `spacing` are both given, the result would
        be larger than `max_gb`, or spots were moved since the fit.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> dense = neurst.tl.neurtv_superres(adata, factor=2)
    >>> 3.5 < dense.n_obs / adata.n_obs < 4.5
    True
    """
    if spacing is not None and factor != 2:
        msg = f"`factor={factor:g}` and `spacing={spacing:g}` were both given: pass one of them"
        raise ValueError(msg)
    if not keys.fit_slot(key).present(adata) and (key == keys.DEFAULT_KEY or not keys.holds_fit(adata)):
        read.gene_index(adata, genes)  # before a fit that takes its time
        neurtv_fit(adata, key_added=key, progress=progress)
    stored = stored_fit(adata, key)
    write.check_images(adata)
    coords, supports = results.check_places(adata, stored)
    names = results.field_genes(stored, genes)
    support = support_of(stored.spots, support_radius)
    # measured spots may be a subset, whose tissue is filled; points of a query fill the tissue of all fitted spots
    filled = support if stored.query is not None else support.restricted_to(coords[supports])
    points = _dense_points(filled, stored, names, max_gb, factor=factor, spacing=spacing, kind=lattice)
    spacing = support.pitch / factor if spacing is None else spacing
    out = _read_at(adata, stored, points, names, support, support.contains(points), {"spacing": float(spacing)})
    between = support.pitch if stored.query is None else stored.query.get("spacing", support.pitch)
    write.copy_images(adata, out, spacing / between)
    return out


def _dense_points(support: Support, stored: StoredFit, genes: Sequence[str], max_gb: float, **options) -> NDArray:
    """Points of a lattice, at which values of `genes` take at most `max_gb`."""
    tables = 1 if not _has_std(stored.field) else 2
    bytes_each = 4 * len(genes) * tables + 16 * stored.field.n_dims + BYTES_OF_OBS
    try:
        return support.lattice(**options, max_points=max(1, int(max_gb * 1e9 / bytes_each)))
    except TooManyPoints as error:
        msg = (
            f"the result with {len(genes)} genes would take about {error.count * bytes_each / 1e9:,.1f} GB, above `max_gb={max_gb:g}`: {error}. "
            "Pass a larger `spacing`, a smaller `factor`, fewer `genes`, or a larger `max_gb`"
        )
        raise ValueError(msg) from None


def _has_std(field: ExpressionField) -> bool:
    return field.members is not None and len(field.members.weights) >= write.LEAST_FOR_STD


def _read_at(
    adata: AnnData,
    stored: StoredFit,
    points: NDArray,
    genes: Sequence[str],
    support: Support,
    inside: NDArray,
    about: dict[str, Any],
) -> AnnData:
    """A new AnnData of a field at points. `about` says how: values outside the tissue are NaN if ``about["outside"]`` is "nan"."""
    field = stored.field.select(genes)
    values, std = _evaluate(field, points)
    if about.get("outside") == "nan":
        for table in (values,) if std is None else (values, std):
            table[~inside] = np.nan
    return write.new_adata(
        adata,
        stored,
        points,
        values,
        std,
        genes,
        distance=support.distance(points),
        in_support=inside,
        radius=support.radius,
        about=about,
    )


@checked(
    adata=read.ADATA,
    coords=ANYTHING,
    genes=FIT_RULES["genes"],
    key=read.KEY,
    outside=one_of("nan", "extrapolate", "raise"),
    support_radius=LENGTH,
)
def neurtv_query(
    adata: AnnData,
    coords: ArrayLike,
    *,
    genes: Sequence[str] | str | None = None,
    key: str = "neurtv",
    outside: Literal["nan", "extrapolate", "raise"] = "nan",
    support_radius: float | None = None,
) -> AnnData:
    """Values of the stored field at any coordinates, as a new AnnData.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``; its own spots are not used.
    coords
        (N, d) points, in the units of the positions that the field was fitted to.
    genes
        Names of genes; None takes all. Only fitted genes have a field.
    key
        Name of the fit.
    outside
        What to do outside the tissue: ``"nan"`` sets values to NaN, ``"extrapolate"`` evaluates the field there as well, ``"raise"`` is an error.
    support_radius
        As in :func:`neurtv_superres`.

    Returns
    -------
    AnnData
        As from :func:`neurtv_superres`, but without ``uns["spatial"]``; one row for each point, in the order given.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, `coords` has another shape or is not finite, or a point is outside and ``outside="raise"``.

    Warns
    -----
    UserWarning
        If most points are far outside the range of the fitted spots, or all values are NaN: the units may differ.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_query(adata, adata.obsm["spatial"][:5] + 30.0).shape
    (5, 20)
    """
    stored = stored_fit(adata, key)
    names = results.field_genes(stored, genes)
    coords = coordinates("coords", coords, (stored.field.n_dims,), least=1)
    support = support_of(stored.spots, support_radius)
    inside = support.contains(coords)
    beyond = ~inside
    if outside == "raise" and beyond.any():
        first = int(np.argmax(beyond))
        msg = (
            f"`coords`: {int(beyond.sum())} of {len(coords)} points are outside the tissue, more than {support.radius:.4g} from a spot (first: row {first}, "
            f"{coords[first].tolist()}): drop them, or pass outside='nan' or 'extrapolate'"
        )
        raise ValueError(msg)
    if _is_elsewhere(coords, stored.spots) or (outside == "nan" and beyond.all()):
        warn(
            f"{int(beyond.sum())} of {len(coords)} points are outside the tissue: `coords` range from {_range(coords)}, but the field was "
            f"fitted from {_range(stored.spots)}; are the units the same?"
        )
    return _read_at(adata, stored, coords, names, support, inside, {"outside": outside})


def _is_elsewhere(coords: NDArray, spots: NDArray) -> bool:
    """Whether most points are farther from the bounding box of the spots than half its longest side."""
    low, high = spots.min(0), spots.max(0)
    margin = (high - low).max() / 2
    return ((coords < low - margin) | (coords > high + margin)).any(axis=1).mean() > 0.5


def _range(x: NDArray) -> str:
    def show(corner: NDArray) -> str:
        return "(" + ", ".join(f"{v:.6g}" for v in corner) + ")"

    return f"{show(x.min(0))} to {show(x.max(0))}"


@checked(adata=read.ADATA, genes=FIT_RULES["genes"], key=read.KEY)
def neurtv_gradient(adata: AnnData, *, genes: Sequence[str] | str | None = None, key: str = "neurtv") -> None:
    r"""Exact spatial derivatives of the stored field at the spots.

    For counts, :math:`\partial_x \mu_g = \mu_g\, V_g \cdot \partial_x z`, with derivatives of the network by Taylor arithmetic, not finite
    differences.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``: the fitted section, some of its spots, or what :func:`neurtv_superres` or :func:`neurtv_query` returned.
    genes
        Names of genes; None takes all. Only fitted genes have a field.
    key
        Name of the fit.

    Returns
    -------
    None, and writes

    ``layers["<key>_dx"]``, ``layers["<key>_dy"]`` (and ``["<key>_dz"]`` in 3-d) : (n_obs, n_vars) float32
        Derivatives of the expected expression per unit of the coordinates; in `obsm` for fewer than half of the genes.
    ``var["<key>_gradient"]`` : float
        Mean norm of a gene's gradient over the spots in the tissue.
    ``obs["<key>_boundary"]`` : float
        Strength of tissue boundaries: the norm over all fitted genes of the Jacobian of the log of expected counts (or of normalised values), per
        unit of the coordinates.

    Raises
    ------
    KeyError, TypeError, ValueError
        If there is no such fit or gene, spots were moved or rescaled since the fit, results would overwrite something that is not from
        this fit, or a table would be above 2 GB.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_gradient(adata)
    >>> sorted(adata.layers)
    ['neurtv', 'neurtv_dx', 'neurtv_dy']
    """
    stored = stored_fit(adata, key)
    names = results.genes_at_hand(adata, stored, genes)
    coords, _ = results.check_places(adata, stored)
    write.check_gradient_slots(adata, stored, len(names))
    field, masked = stored.field.select(names), results.masked_points(adata, stored)
    tissue = read.in_tissue(adata) & ~masked
    derivatives = [np.empty((len(coords), len(names)), dtype=np.float32) for _ in range(field.n_dims)]
    total = np.zeros(len(names))
    for rows in spot_chunks(len(coords), len(names) * field.n_dims):
        gradient = field.jacobian(coords[rows])
        total += np.linalg.norm(gradient[tissue[rows]], axis=-1).sum(0)
        gradient[masked[rows]] = np.nan
        for axis, table in enumerate(derivatives):
            table[rows] = gradient[:, :, axis]
    boundary = np.where(masked, np.nan, stored.field.boundary(coords))
    columns = adata.var_names.get_indexer(names)
    write.write_gradient(adata, stored, columns, derivatives, total / max(tissue.sum(), 1), boundary)
