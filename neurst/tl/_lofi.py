"""Expression between the spots by local fields, which are trained on one or many sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from neurst.core.arguments import ANYTHING, FLAG, PATH, checked, coordinates, instance, several
from neurst.core.progress import progress_bar
from neurst.spatial.adata import lofi as slots
from neurst.spatial.adata import read
from neurst.spatial.lofi import LoFiConfig, LoFiSpots
from neurst.spatial.lofi_fit import fit_lofi
from neurst.spatial.support import support_of
from neurst.tl._fit import FIT_RULES

MODEL = instance(LoFiSpots, "a model that `neurst.tl.lofi_fit` or `neurst.tl.lofi_load` returned")
READ_RULES = {name: FIT_RULES[name] for name in ("layer", "spatial_key", "library_key", "size_factors")}


@checked(
    adatas=several(read.ADATA),
    config=instance(LoFiConfig, "a `neurst.tl.LoFiConfig`"),
    **READ_RULES,
    **{name: FIT_RULES[name] for name in ("genes", "device", "random_state", "progress")},
)
def lofi_fit(
    adatas: AnnData | Sequence[AnnData],
    *,
    genes: Sequence[str] | str | None = None,
    layer: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    size_factors: str | None = None,
    config: LoFiConfig = LoFiConfig(),
    device: str = "auto",
    random_state: int = 0,
    progress: bool = True,
) -> LoFiSpots:
    r"""Train a local field on the counts of one or many sections, which need not be registered.

    .. math::
        y_{ig} \sim \mathrm{Poisson}\big(t_i\, p_g \exp(b_g + V_g \cdot z(x_i))\big), \qquad
        z(x) = \sum_h a_h \odot u_h(x) + f(u_1(x), \dots, u_H(x))

    Here :math:`t_i` is the library size, p are the mean rates of a section, and each :math:`u_h(x)` is a kriging mean of the latents of the nearest measured spots, with
    its own kernel length and noise level (:mod:`neurst.spatial.lofi`). The weights a, the network f :cite:p:`Khorashadizadeh2024` and the gene loadings V and b are learned by
    hiding spots, and discs around them, and predicting their counts from the spots that are left. The model holds no positions: what it learned on some sections
    predicts any other section from that section's own spots.

    Parameters
    ----------
    adatas
        One AnnData or a list of them, with counts in `X` or `layer`. The genes of the first section can be predicted; further sections may lack some of them.
    genes
        Names of genes; None takes all. They are genes of the first section.
    layer
        Layer to fit; `X` if None.
    spatial_key
        Key of the positions in `obsm`. They may have other units in each section.
    library_key
        Column of `obs` that names the section of each spot; each AnnData is divided into its sections by it.
    size_factors
        As in :func:`neurtv_fit`, but None or a column of `obs`.
    config
        Further numerical settings of the method.
    device
        ``"auto"`` is CUDA, else MPS, else the CPU; or the name of a torch device.
    random_state
        Seed of every draw: the same seed on the same machine gives the same numbers.
    progress
        Show a progress bar. Loadings of genes beyond the 1,000 most variable ones are solved for after the training, which takes about four seconds for 1,000 genes, each of two members, and 2,500 spots.

    Returns
    -------
    LoFiSpots
        The model, for :func:`lofi_predict` and :func:`lofi_query`; its method ``save(path)`` writes a file that :func:`lofi_load` reads.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, a key, layer or gene is unknown, positions are missing, not finite or degenerate, an AnnData seems to hold several
        sections without a `library_key`, values are not counts, or a section has no gene in common with the first one.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> config = neurst.tl.LoFiConfig(steps=20, n_members=1)
    >>> model = neurst.tl.lofi_fit(adata, config=config, progress=False)
    >>> neurst.tl.lofi_predict(adata, model=model)
    >>> adata.layers["lofi"].shape == adata.shape
    True
    """
    if size_factors is not None and not isinstance(size_factors, str):
        msg = f"`size_factors` is a {type(size_factors).__name__}: expected None, or the name of a column of `obs` that each section has"
        raise TypeError(msg)
    sections = slots.read_sections(adatas, genes, layer, spatial_key, library_key, size_factors)
    with progress_bar(progress) as on_progress:
        return fit_lofi(sections, config, device=device, random_state=random_state, on_progress=on_progress)


@checked(path=PATH)
def lofi_load(path) -> LoFiSpots:
    """The local field in a file that its method ``save(path)`` wrote.

    Parameters
    ----------
    path
        Path of the file.

    Returns
    -------
    LoFiSpots
        The model, which predicts the same numbers as the one that was saved.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        If there is no such file, it is damaged, or holds something else.

    Examples
    --------
    >>> import neurst, tempfile
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> config = neurst.tl.LoFiConfig(steps=5, n_members=1)
    >>> model = neurst.tl.lofi_fit(adata, config=config, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(folder + "/cortex.safetensors")
    ...     len(neurst.tl.lofi_load(folder + "/cortex.safetensors").genes)
    20
    """
    return LoFiSpots.load(path)


@checked(adata=read.ADATA, model=MODEL, include_self=FLAG, key_added=FIT_RULES["key_added"], **READ_RULES)
def lofi_predict(
    adata: AnnData,
    *,
    model: LoFiSpots,
    layer: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    size_factors: str | Sequence[float] | None = None,
    include_self: bool = False,
    key_added: str = "lofi",
) -> None:
    """Expected expression at the spots of a section by a trained local field, from the measured spots around each.

    Parameters
    ----------
    adata
        One section with counts. The model may have been trained on it or on other sections.
    model
        What :func:`lofi_fit` or :func:`lofi_load` returned.
    layer
        As in :func:`neurtv_fit`.
    spatial_key
        Key of the positions in `obsm`. They may have other units than the sections of the training.
    library_key
        As in :func:`neurtv_fit`.
    size_factors
        As in :func:`neurtv_fit`.
    include_self
        If False, each spot is predicted from the other spots alone, as a held-out spot would be. If True, its own counts take part in the average as well, which is the better estimate
        of its expression.
    key_added
        Name under which results are stored.

    Returns
    -------
    None, and writes

    ``layers[key]`` : (n_obs, n_vars) float32
        Expected counts at library size ``target_sum``, the median of the section. NaN for genes that the model does not know; for fewer than half of
        the genes it is ``obsm[key]``, a DataFrame, instead.
    ``uns[key]`` : dict
        Arguments, ``target_sum`` and versions.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, as in :func:`lofi_fit`, results would overwrite something that is not from an earlier prediction, or the table would be larger than 2 GB. `adata` is then unchanged.

    Examples
    --------
    >>> import neurst
    >>> one, other = (neurst.datasets.synthetic_visium(n_genes=20, random_state=seed) for seed in (0, 1))
    >>> config = neurst.tl.LoFiConfig(steps=5, n_members=1)
    >>> model = neurst.tl.lofi_fit(one, config=config, progress=False)
    >>> neurst.tl.lofi_predict(other, model=model)
    >>> sorted(other.uns["lofi"])
    ['method', 'params', 'slots', 'target_sum', 'versions']
    """
    known = slots.shared_genes(adata, model.genes, "`adata`", "the model")
    slots.prediction_slots(adata, key_added, len(known))
    measured = slots.read_section(adata, known, layer, spatial_key, library_key, size_factors)
    _check_genes(model, measured)
    target_sum, fitted = measured.data.observation.target_sum(), measured.fitted
    slots.check_size(adata, key_added, len(known))
    values = np.empty((adata.n_obs, len(measured.columns)), dtype=np.float32)
    values[fitted] = target_sum * model.rates(measured.data, include_self=include_self)
    if not fitted.all():
        values[~fitted] = target_sum * model.rates(measured.data, measured.coords[~fitted])
    params = _arguments(layer, spatial_key, library_key, size_factors) | {"include_self": include_self}
    slots.write_prediction(adata, key_added, values, measured.columns, target_sum, params)


@checked(adata=read.ADATA, coords=ANYTHING, model=MODEL, **READ_RULES)
def lofi_query(
    adata: AnnData,
    coords: ArrayLike,
    *,
    model: LoFiSpots,
    layer: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    size_factors: str | Sequence[float] | None = None,
) -> AnnData:
    """Expected expression at any coordinates of a section by a trained local field, as a new AnnData.

    Parameters
    ----------
    adata
        One section with counts, whose spots are the neighbours of the points. The model may have been trained on it or on other sections.
    coords
        As in :func:`neurtv_query`, in the units of ``obsm[spatial_key]``.
    model
        What :func:`lofi_fit` or :func:`lofi_load` returned.
    layer
        As in :func:`neurtv_fit`.
    spatial_key
        Key of the positions in `obsm`. They may have other units than the sections of the training.
    library_key
        As in :func:`neurtv_fit`.
    size_factors
        As in :func:`neurtv_fit`.

    Returns
    -------
    AnnData
        ``X`` (float32): expected counts at library size ``uns["lofi"]["target_sum"]``, one row for each point in the order given; also ``var`` with its columns,
        ``obsm["spatial"]``, ``obs["distance_to_spot"]`` and ``obs["in_support"]``. Values outside the tissue are extrapolated.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not valid, as in :func:`lofi_fit`, or `coords` has another shape or is not finite.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> config = neurst.tl.LoFiConfig(steps=5, n_members=1)
    >>> model = neurst.tl.lofi_fit(adata, config=config, progress=False)
    >>> neurst.tl.lofi_query(adata, adata.obsm["spatial"][:5] + 30.0, model=model).shape
    (5, 20)
    """
    known = slots.shared_genes(adata, model.genes, "`adata`", "the model")
    measured = slots.read_section(adata, known, layer, spatial_key, library_key, size_factors)
    _check_genes(model, measured)
    data = measured.data
    coords = coordinates("coords", coords, (data.coords.shape[1],), least=1)
    target_sum, support = data.observation.target_sum(), support_of(data.coords)
    about = {"target_sum": target_sum, "params": _arguments(layer, spatial_key, library_key, size_factors)}
    return slots.new_prediction(
        adata,
        coords,
        (target_sum * model.rates(data, coords)).astype(np.float32),
        data.genes,
        distance=support.distance(coords),
        in_support=support.contains(coords),
        about=about,
    )


def _check_genes(model: LoFiSpots, measured: read.Measured) -> None:
    """Require genes from which the model reads latents."""
    here: NDArray = model.encoder.columns(measured.data.genes)[0]
    if not len(here):
        msg = (
            f"`adata` has {len(measured.data.genes)} genes of the model, but none of the {len(model.encoder.genes)} that it reads, such as "
            f"{str(model.encoder.genes[0])!r}: pass an AnnData with more of the genes of the training"
        )
        raise ValueError(msg)


def _arguments(
    layer: str | None, spatial_key: str, library_key: str | None, size_factors: str | Sequence[float] | None
) -> dict[str, Any]:
    """Arguments as a file can store them, without those that are None; library sizes that were given as an array are stored as such."""
    sizes = size_factors if size_factors is None or isinstance(size_factors, str) else np.asarray(size_factors, float)
    given = {"layer": layer, "spatial_key": spatial_key, "library_key": library_key, "size_factors": sizes}
    return {name: value for name, value in given.items() if value is not None}
