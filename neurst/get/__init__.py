"""Access to stored results."""

from __future__ import annotations

from anndata import AnnData

from neurst.spatial import slots
from neurst.spatial.expression import ExpressionField

__all__ = ["field"]


def field(adata: AnnData, key: str = "neurtv") -> ExpressionField:
    """The fitted expression field as a function of coordinates: numpy in, numpy out, no AnnData inside.

    Parameters
    ----------
    adata
        Holds a fit under ``uns[key]``.
    key
        Name of the fit.

    Returns
    -------
    ExpressionField
        ``field(coords)`` (N, G), ``.gradient`` (N, G, d), ``.hessian`` (N, G, d, d), ``.latent`` (N, r), ``.edge`` (N,), ``.genes``, and
        ``.select(genes)``. Coordinates (N, d) and derivatives are in the units of ``obsm[spatial_key]``.

    Raises
    ------
    KeyError, ValueError
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
    return slots.stored(adata, key).field
