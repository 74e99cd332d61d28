"""Tools: fit a field, evaluate it, differentiate it, score it; train local fields on many sections."""

from neurst.core.tuning import LineSearch
from neurst.spatial.lofi import LoFiConfig, LoFiSpots
from neurst.spatial.spec import ExpressionConfig
from neurst.tl._fit import neurtv_fit
from neurst.tl._holdout import holdout_score
from neurst.tl._lofi import lofi_fit, lofi_load, lofi_predict, lofi_query
from neurst.tl._read import neurtv_gradient, neurtv_query, neurtv_superres

__all__ = [
    "ExpressionConfig",
    "LineSearch",
    "LoFiConfig",
    "LoFiSpots",
    "holdout_score",
    "lofi_fit",
    "lofi_load",
    "lofi_predict",
    "lofi_query",
    "neurtv_fit",
    "neurtv_gradient",
    "neurtv_query",
    "neurtv_superres",
]
