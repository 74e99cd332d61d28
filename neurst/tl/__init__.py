"""Tools: fit a field, evaluate it, differentiate it, score it."""

from neurst.core.tuning import LineSearch
from neurst.spatial.spec import ExpressionConfig
from neurst.tl._fit import neurtv_fit
from neurst.tl._holdout import holdout_score
from neurst.tl._read import neurtv_gradient, neurtv_query, neurtv_superres

__all__ = [
    "ExpressionConfig",
    "LineSearch",
    "holdout_score",
    "neurtv_fit",
    "neurtv_gradient",
    "neurtv_query",
    "neurtv_superres",
]
