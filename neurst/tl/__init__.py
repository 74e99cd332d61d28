"""Tools: fit a field, read it, differentiate it."""

from neurst.tl._neurtv import neurtv_fit, neurtv_gradient, neurtv_query, neurtv_superres

__all__ = ["neurtv_fit", "neurtv_gradient", "neurtv_query", "neurtv_superres"]
