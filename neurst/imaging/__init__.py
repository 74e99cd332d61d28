"""Pictures, cubes and point clouds as continuous fields."""

from neurst.imaging import metrics
from neurst.imaging.cubes import Demixed, demix
from neurst.imaging.points import Attributes, fit_attributes, recover_attributes
from neurst.imaging.restore import denoise, fit_image, inpaint, upsample
from neurst.imaging.surface import Surface, fit_surface

__all__ = [
    "Attributes",
    "Demixed",
    "Surface",
    "demix",
    "denoise",
    "fit_attributes",
    "fit_image",
    "fit_surface",
    "inpaint",
    "metrics",
    "recover_attributes",
    "upsample",
]
