"""Access to stored results."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from neurst.core.arguments import checked
from neurst.spatial.adata.read import ADATA, KEY
from neurst.spatial.adata.serialise import arguments_of, stored_fit
from neurst.spatial.field import ExpressionField

__all__ = ["field", "params"]


@checked(adata=ADATA, key=KEY)
def field(adata: AnnData, key: str = "neurtv") -> ExpressionField:
    """The fitted expression field, a function from arrays of coordinates to arrays of expression. It holds no AnnData.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``.
    key
        Name of the fit.

    Returns
    -------
    ExpressionField
        ``field(coords)`` (N, G), ``.jacobian`` or ``.gradient`` (N, G, d), ``.hessian`` (N, G, d, d), ``.partials``, ``.latent`` (N, r), ``.boundary`` (N,),
        ``.std`` (N, G), ``.genes``, ``.select(genes)``, ``.save(path)``. Coordinates (N, d) and derivatives are in the units of
        ``obsm[spatial_key]``.

    Raises
    ------
    KeyError, TypeError, ValueError
        If there is no fit under `key`, or it cannot be read.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, progress=False)
    >>> f = neurst.get.field(adata)
    >>> f.gradient(adata.obsm["spatial"][:3]).shape
    (3, 20, 2)
    """
    return stored_fit(adata, key).field


@checked(adata=ADATA, key=KEY)
def params(adata: AnnData, key: str = "neurtv") -> dict[str, Any]:
    """The arguments that repeat a stored fit: ``neurst.tl.neurtv_fit(adata, **neurst.get.params(adata))`` gives the same field.

    Parameters
    ----------
    adata, key
        As in :func:`field`.

    Returns
    -------
    dict
        Arguments of :func:`neurst.tl.neurtv_fit`. Those that were ``"auto"`` have the values that were used, except `lam` and
        `device`, which are chosen again. They suit the spots of the fit: after taking a subset, pass `size_factors` of your own if it is an array.

    Raises
    ------
    KeyError
        If there is no fit under `key`.
    TypeError, ValueError
        If it cannot be read.

    Examples
    --------
    >>> import neurst
    >>> adata = neurst.datasets.synthetic_visium(n_genes=20)
    >>> neurst.tl.neurtv_fit(adata, lam=400, steps=20, n_members=1, progress=False)
    >>> arguments = neurst.get.params(adata)
    >>> arguments["lam"], arguments["steps"], arguments["likelihood"]
    (400.0, 20, 'poisson')
    """
    return arguments_of(stored_fit(adata, key))
