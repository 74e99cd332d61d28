"""neurst: continuous, differentiable fields for spatial omics, regularised by NeurTV."""

from neurst import datasets, get, imaging, pl, tl

__version__ = "0.1.0"
__all__ = ["datasets", "get", "imaging", "pl", "tl"]
