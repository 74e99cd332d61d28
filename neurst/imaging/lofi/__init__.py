"""Local neural fields: the value at any coordinate from the observed values around it."""

from neurst.imaging.lofi.model import LoFi, load_lofi, pretrained_lofi
from neurst.imaging.lofi.spec import LoFiSpec
from neurst.imaging.lofi.training import LoFiTraining, fit_lofi
from neurst.imaging.lofi.warp import GeometryConfig, Warp, learn_geometry

__all__ = [
    "GeometryConfig",
    "LoFi",
    "LoFiSpec",
    "LoFiTraining",
    "Warp",
    "fit_lofi",
    "learn_geometry",
    "load_lofi",
    "pretrained_lofi",
]
