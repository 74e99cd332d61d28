"""Expression between the spots: fit a NeurTV field, read it anywhere."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from neurst.core import nets
from neurst.core.fit import FitConfig
from neurst.core.nets import Network, as_network
from neurst.core.penalty import as_penalty
from neurst.spatial import door, slots
from neurst.spatial.choice import LamSearch
from neurst.spatial.fitting import fit_expression, planned_steps
from neurst.spatial.model import Model
from neurst.spatial.tissue import CHOICES, geometry, query_lattice
from neurst.tl._options import check_device, check_options, check_positive, check_whole, named_penalties, progress_bar

LATTICES = tuple(dict.fromkeys(CHOICES[2] + CHOICES[3]))
log = logging.getLogger("neurst")


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
    penalty: str | Sequence[str] = "auto",
    lam: float | Literal["auto"] = "auto",
    for_gaps: bool = False,
    rank: int = 20,
    network: str | Network = "auto",
    n_members: int = 2,
    steps: int | Literal["auto"] = "auto",
    device: str = "auto",
    random_state: int = 0,
    key_added: str = "neurtv",
    progress: bool = True,
) -> None:
    r"""Fit a continuous expression field to the spots of one section.

    .. math::
        y_{ig} \sim \mathrm{Poisson}\big(t_i \exp(b_g + V_g \cdot z(x_i))\big), \qquad
        \min_{z, V, b} \; -\log p(y) + \lambda \, \mathrm{mean}_x\, P(z)(x) + \tfrac12 \|V\|_F^2

    with z a coordinate network with `rank` latent channels, V gene loadings, :math:`t_i` the library size and P a total variation of
    z from its exact derivatives (NeurTV :cite:p:`Luo2025`). For normalised data the link is the identity and the noise Gaussian, one
    scale per gene. The field is the mean, on the scale of the predictor, of `n_members` such fits that differ in penalty and seed.
    20 % of the spots are held out to choose `lam` for each penalty, to weigh the penalties, and to score each gene; the members
    that are kept are then fitted to all spots. z and V are fitted to the 1,000 most variable genes; the loadings of further
    genes are solved for on z.

    Parameters
    ----------
    adata
        One section: positions in ``obsm[spatial_key]`` (2-d or 3-d, any unit), expression in `X` or `layer`.
    genes
        Names of the genes to fit; all if None.
    layer
        Layer to fit; `X` if None.
    spatial_key, library_key
        Where positions are; the column of `obs` that names sections, of which there may be one only.
    likelihood
        ``"auto"`` is Poisson if the matrix holds whole numbers >= 0, else Gaussian.
    size_factors
        Library sizes, an array (n_obs,) or a column of `obs`. If None, totals over *all* genes of the layer.
    footprint
        Diameter of a spot, in the units of the coordinates: its counts are then taken for those of a disc (a ball in 3-d), the mean
        rate at 4 (6) points of it, and the field is sharper than the spots. None takes a spot for a point. ``"auto"`` is
        ``uns["spatial"][...]["scalefactors"]["spot_diameter_fullres"]``, else 0.55 of the pitch on a lattice (Visium); irregular
        positions are points.
    penalty
        On the latent field: ``"nuclear"`` (:class:`neurst.core.penalty.NuclearTV`: channels share their directions),
        ``"space_variant"`` (:class:`neurst.core.penalty.SpaceVariantTV`: weaker at edges and across them), ``"isotropic"``,
        ``"anisotropic"``, ``"vectorial"``, ``"edge_weighted"``, ``"second_order"``, ``"hessian"`` or ``"tgv"``; or several of them, to be averaged.
        ``"auto"`` is the first two: which of them suits a tissue, their weights on held-out spots say.
    lam
        Prior strength in nats, or ``"auto"``: short fits on a coarse grid, scored on held-out spots
        (:class:`neurst.spatial.choice.LamSearch`). A good value hardly moves with the number of spots or genes.
    for_gaps
        False holds out single spots, so that the choices suit what lies between neighbouring spots; True holds out discs, so that
        they, and the scores, suit gaps wider than that.
    rank
        Latent channels of a member, lowered where there are fewer spots or genes. Channels without support in the data vanish.
    network
        ``"siren"``, ``"fourier"``, ``"lowrank"``, ``"spline"``, or a specification such as ``neurst.core.nets.Siren(width=64)``. ``"auto"`` is a SIREN
        whose finest scale follows the number of spots, ``omega = 5 max(1, N / 5000)^(1/4)``.
    n_members
        Fits that are averaged, in turn one of each penalty. Their spread is the standard deviation that is written from 4 on.
    steps
        Optimisation steps of each final fit; ``"auto"`` is ``500 max(1, N / 5000)^(1/4)``.
    device
        ``"auto"`` is CUDA, else MPS, else the CPU.
    random_state
        Seed; the same seed on the same machine gives the same field.
    key_added
        Name of the results.
    progress
        Show a progress bar. An interrupt leaves `adata` as it was.

    Returns
    -------
    None, and writes

    ``layers[key]`` : (n_obs, n_vars) float32
        Expected expression at the spots (with a `footprint`: at their centres): for counts at library size ``target_sum`` (the median of the fitted spots), else
        in the units of the data. NaN for genes that were not fitted.
    ``layers["<key>_std"]`` : (n_obs, n_vars) float32, if ``n_members >= 4``
        Standard deviation of the expected expression between members, in its units.
    ``obsm["X_<key>"]`` : (n_obs, r) float32
        Latent coordinates, centred, by falling variance; r, at most ``rank * n_members``, is what held.
    ``varm["<key>_loadings"]`` : (n_vars, r) float32
        Orthonormal gene loadings.
    ``var["<key>_fitted"]``, ``var["<key>_empty"]`` : bool
        Genes that were fitted; those of them without counts (or without variation), which get their mean.
    ``var["<key>_deviance_explained"]`` : float
        Share of the Poisson deviance (variance, for normalised data) explained on the held-out spots: below 0 is worse than the
        gene's mean. Trust a gene between spots only if it is clearly positive.
    ``var["<key>_dispersion"]`` : float, for counts
        :math:`\phi_g` of the held-out counts, of variance :math:`\mu + \phi_g \mu^2` about the prediction.
    ``uns[key]`` : dict
        Parameters, versions, history, every `lam` tried with its score, and the whole field as plain arrays.

    Raises
    ------
    KeyError, ValueError
        If a key, layer or gene is unknown, positions are missing, not finite or degenerate, or values do not suit the
        likelihood. `adata` is then unchanged.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> adata.layers["neurtv"].shape == adata.shape
    True
    """
    slots.check_key(adata, key_added)
    check_options(likelihood, lam, for_gaps)
    check_whole(1, rank=rank, n_members=n_members, **({} if steps == "auto" else {"steps": steps}))
    check_whole(0, random_state=random_state)
    check_device(device)
    options = {"penalty": penalty, "network": network, "rank": rank, "n_members": n_members, "steps": steps}
    options |= {"device": device, "random_state": random_state}
    default_model(0, **options)  # what is wrong with them is said before a matrix is read
    reading = door.read(
        adata,
        genes=genes,
        layer=layer,
        spatial_key=spatial_key,
        library_key=library_key,
        likelihood=likelihood,
        size_factors=size_factors,
        footprint=footprint,
    )
    model = default_model(int(reading.spots.sum()), **options)
    model, search = dataclasses.replace(model, likelihood=reading.likelihood), LamSearch()
    with progress_bar(planned_steps(lam, model, search), progress) as on_step:
        fitted = fit_expression(
            reading.problem,
            model,
            lam=lam,
            target_sum=reading.target_sum,
            for_gaps=for_gaps,
            search=search,
            on_step=on_step,
        )
    log.info("lam=%s; %.3f of the deviance of held-out spots explained", np.round(fitted.lam), fitted.score)
    params = {
        "layer": "X" if layer is None else layer,
        "spatial_key": spatial_key,
        "likelihood": reading.likelihood,
        "size_factors": _size_source(size_factors),
        "target_sum": reading.target_sum,
        "footprint": reading.problem.footprint or 0.0,
        "penalties": [str(name) for name in named_penalties(penalty)],
        "lam": lam,
        "for_gaps": bool(for_gaps),
        "rank": rank,
        "n_members": n_members,
        "network": nets.to_dict(model.network),
        "steps": model.config.steps,
        "random_state": random_state,
        "device": str(device),
        "n_spots": int(reading.spots.sum()),
        "n_genes": len(reading.genes),
    }
    slots.write_fit(
        adata, key_added, reading=reading, fitted=fitted, network=model.network, params=params, spatial_key=spatial_key
    )


def default_model(
    n_spots: int,
    *,
    penalty: str | Sequence[str] = "auto",
    network: str | Network = "auto",
    rank: int = 20,
    n_members: int = 2,
    steps: int | Literal["auto"] = "auto",
    device: str = "auto",
    random_state: int = 0,
) -> Model:
    """What :func:`neurtv_fit` fits to so many spots; the arguments are its own.

    Of a section of N > 5,000 spots the network and the steps grow with the fourth root of N: twice as fine, and for twice
    as long, on 16 times the spots.
    """
    growth = max(1.0, n_spots / 5000) ** 0.25
    spec = nets.Siren(omega=round(5.0 * growth, 1)) if network == "auto" else as_network(network)
    # int: a number of numpy is no seed for torch
    numbers = {"steps": round(500 * growth) if steps == "auto" else int(steps), "random_state": int(random_state)}
    config = FitConfig(n_regularisation=128, refresh_every=25, device=device, **numbers)
    penalties = tuple(as_penalty(name) for name in named_penalties(penalty))
    return Model("poisson", penalties, spec, int(rank), config, int(n_members))


def _size_source(size_factors: str | Sequence[float] | None) -> str:
    """Where library sizes came from: a column of `obs`, the totals, or an array."""
    if isinstance(size_factors, str):
        return size_factors
    return "totals" if size_factors is None else "array"


def _genes(kept: slots.Stored, genes: Sequence[str] | str | None) -> list[str]:
    fitted = list(kept.field.genes)
    return fitted if genes is None else door.known_genes(genes, fitted, "genes of the field")


def neurtv_superres(
    adata: AnnData,
    *,
    factor: float = 2,
    spacing: float | None = None,
    lattice: Literal["auto", "hexagonal", "square", "cubic"] = "auto",
    support_radius: float | None = None,
    genes: Sequence[str] | str | None = None,
    key: str = "neurtv",
    progress: bool = True,
) -> AnnData:
    """Expression on a dense lattice inside the tissue, as a new AnnData.

    Reads the field stored under ``uns[key]``. If there is none, :func:`neurtv_fit` is called with its defaults first, so `adata`
    then also holds the fit; but a `key` other than the default is taken for a slip if there are fits under other names.

    Parameters
    ----------
    adata
        One section.
    factor
        Spacing of the lattice is the spot pitch divided by this: 2 gives about four times the spots in 2-d.
    spacing
        Spacing in the units of the coordinates, instead of `factor`.
    lattice
        ``"auto"`` is hexagonal where the spots are, else square; cubic in 3-d. On a lattice of spots it follows theirs.
    support_radius
        Points within this distance of a measured spot are tissue. If None, 1.05 pitch on lattices (one missing spot is filled, a
        larger hole is not), else the 99th percentile of the distance to the third neighbour.
    genes
        Fitted genes to read; all if None.
    key
        Name of the fit.
    progress
        Show a progress bar if a fit is needed.

    Returns
    -------
    AnnData
        ``X`` (float32): expected expression, for counts at library size ``uns[key]["field"]["target_sum"]``. ``var`` with its columns,
        ``obsm["spatial"]``, ``obs["distance_to_spot"]``, ``obs["in_support"]``, ``uns["spatial"]`` copied with the spot diameter
        adjusted, and ``uns[key]`` with the field, so that it can be queried and differentiated further.

    Raises
    ------
    KeyError, ValueError
        If there is no field under a `key` of your own, `factor` and `spacing` are both given or not positive, or the stored
        field was fitted to other spots.

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
        msg = f"`factor={factor!r}` and `spacing={spacing!r}` were both given: pass one of them"
        raise ValueError(msg)
    given = {"spacing": spacing, "support_radius": support_radius}
    check_positive(factor=factor, **{name: value for name, value in given.items() if value is not None})
    if lattice not in LATTICES:
        msg = f"`lattice={lattice!r}` is unknown: choose one of {list(LATTICES)}"
        raise ValueError(msg)
    if key not in adata.uns and (key == slots.DEFAULT_KEY or not slots.holds_fit(adata)):
        door.gene_index(adata, genes)  # before a fit that takes its time
        neurtv_fit(adata, key_added=key, progress=progress)
    kept = slots.stored(adata, key)
    slots.check_same_spots(adata, kept, key)
    names = _genes(kept, genes)
    layout = geometry(kept.spots)
    spacing = layout.pitch / factor if spacing is None else spacing
    radius = layout.support_radius if support_radius is None else support_radius
    coords = query_lattice(kept.spots, spacing=spacing, lattice=lattice, radius=radius, geometry=layout)
    values = slots.read_values(kept.field.select(names), coords)
    out = slots.new_adata(adata, kept, key, coords, values, names, radius=radius)
    slots.copy_images(adata, out, spacing / layout.pitch)
    out.uns[f"{key}_query"]["spacing"] = float(spacing)
    return out


def neurtv_query(
    adata: AnnData,
    coords: ArrayLike,
    *,
    genes: Sequence[str] | str | None = None,
    key: str = "neurtv",
    outside: Literal["nan", "extrapolate", "raise"] = "nan",
    support_radius: float | None = None,
) -> AnnData:
    """The stored field at arbitrary coordinates, as a new AnnData.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``; its own spots are not looked at.
    coords
        (N, d) points in the units the field was fitted in.
    genes
        Fitted genes to read; all if None.
    key
        Name of the fit.
    outside
        Beyond the tissue support: ``"nan"`` masks, ``"extrapolate"`` reads the field all the same, ``"raise"`` refuses.
    support_radius
        As in :func:`neurtv_superres`.

    Returns
    -------
    AnnData
        As from :func:`neurtv_superres`, one row for each point, in the order given.

    Raises
    ------
    ValueError
        If `coords` has another shape, is not finite, or is outside and `outside="raise"`.

    Warns
    -----
    UserWarning
        If most points are far outside the fitted range, or none has a value: other units?

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_query(adata, adata.obsm["spatial"][:5] + 30.0).shape
    (5, 20)
    """
    if outside not in ("nan", "extrapolate", "raise"):
        msg = f"`outside={outside!r}` is unknown: choose 'nan', 'extrapolate' or 'raise'"
        raise ValueError(msg)
    if support_radius is not None:
        check_positive(support_radius=support_radius)
    kept = slots.stored(adata, key)
    names = _genes(kept, genes)
    coords = _check_coords(coords, kept.spots)
    radius = geometry(kept.spots).support_radius if support_radius is None else support_radius
    values = slots.read_values(kept.field.select(names), coords)
    out = slots.new_adata(adata, kept, key, coords, values, names, radius=radius)
    beyond = ~out.obs["in_support"].to_numpy()
    if outside == "raise" and beyond.any():
        first = int(np.argmax(beyond))
        msg = (
            f"`coords`: {int(beyond.sum())} of {len(coords)} points are more than {radius:.4g} from a spot (first: row {first}, "
            f"{coords[first].tolist()}): drop them, or pass outside='nan' or 'extrapolate'"
        )
        raise ValueError(msg)
    if _is_elsewhere(coords, kept.spots) or (outside == "nan" and beyond.all()):
        warnings.warn(
            f"{int(beyond.sum())} of {len(coords)} points are outside the tissue: `coords` range from {_range(coords)}, but the field was "
            f"fitted from {_range(kept.spots)}; are the units the same?",
            UserWarning,
            stacklevel=2,
        )
    if outside == "nan":
        for values in (out.X, *out.layers.values()):
            values[beyond] = np.nan
    out.uns[f"{key}_query"]["outside"] = outside
    return out


def _check_coords(coords: ArrayLike, spots: NDArray) -> NDArray:
    coords = door.as_floats(coords, "`coords`")
    d = spots.shape[1]
    if coords.ndim != 2 or coords.shape[1] != d or len(coords) == 0:
        msg = f"`coords` has shape {coords.shape}: expected (N, {d}) with N >= 1, one row for each point"
        raise ValueError(msg)
    bad = np.flatnonzero(~np.isfinite(coords).all(axis=1))
    if len(bad):
        msg = f"`coords` is not finite in {len(bad)} of {len(coords)} rows (first: row {bad[0]}, {coords[bad[0]].tolist()}): drop them"
        raise ValueError(msg)
    return coords


def _is_elsewhere(coords: NDArray, spots: NDArray) -> bool:
    """Whether most points are farther from the bounding box of the spots than half its longest side."""
    low, high = spots.min(0), spots.max(0)
    reach = (high - low).max() / 2
    return ((coords < low - reach) | (coords > high + reach)).any(axis=1).mean() > 0.5


def _range(x: NDArray) -> str:
    def show(corner: NDArray) -> str:
        return "(" + ", ".join(f"{v:.6g}" for v in corner) + ")"

    return f"{show(x.min(0))} to {show(x.max(0))}"


def neurtv_gradient(adata: AnnData, *, genes: Sequence[str] | str | None = None, key: str = "neurtv") -> None:
    r"""Exact spatial derivatives of the stored field at the spots.

    For counts, :math:`\partial_x \mu_g = \mu_g\, V_g \cdot \partial_x z`, from the jet of the network: no finite differences.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``.
    genes
        Fitted genes to differentiate; all if None.
    key
        Name of the fit.

    Returns
    -------
    None, and writes

    ``layers["<key>_dx"]``, ``layers["<key>_dy"]`` (and ``["<key>_dz"]`` in 3-d) : (n_obs, n_vars) float32
        Derivatives of the expected expression per unit of the coordinates.
    ``var["<key>_gradient"]`` : float
        Mean norm of a gene's gradient over the spots in the tissue.
    ``obs["<key>_edge"]`` : float
        Gene-space norm of the Jacobian, of the log of expected counts (or of normalised values), over all fitted genes: where
        the tissue changes.

    Raises
    ------
    KeyError, ValueError
        If there is no such fit or gene, or a layer would be above 2 GB: keep the genes you need then, or use
        :func:`neurst.get.field`.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> neurst.tl.neurtv_gradient(adata)
    >>> sorted(adata.layers)
    ['neurtv', 'neurtv_dx', 'neurtv_dy']
    """
    kept = slots.stored(adata, key)
    slots.write_gradient(adata, key, kept, _genes_of(adata, kept, genes))


def _genes_of(adata: AnnData, kept: slots.Stored, genes: Sequence[str] | str | None) -> list[str]:
    """Fitted genes that `adata` still has."""
    door.check_var_names(adata)
    if genes is not None:
        return door.known_genes(_genes(kept, genes), list(adata.var_names), "genes in `adata.var_names`")
    left = [g for g in kept.field.genes if g in adata.var_names]
    if not left:
        msg = f"none of the {len(kept.field.genes)} genes of the field is in `adata.var_names`: give them back their names, or refit"
        raise ValueError(msg)
    return left
