"""Pictures, cubes and point clouds as continuous fields."""

from neurst.core.field import load_field
from neurst.core.tuning import LineSearch
from neurst.imaging import metrics
from neurst.imaging.attributes import AttributeConfig, AttributeField, fit_attributes, recover_attributes
from neurst.imaging.cubes import CubeConfig, DenoisedCube, denoise_cube
from neurst.imaging.images import denoise, fit_image, inpaint, upsample
from neurst.imaging.lofi import LoFi, LoFiSpec, fit_lofi, learn_geometry, load_lofi
from neurst.imaging.options import FitOptions
from neurst.imaging.pixels import ImageConfig
from neurst.imaging.plug_and_play import PlugAndPlayConfig, plug_and_play
from neurst.imaging.surface import Surface, SurfaceConfig, fit_surface

__all__ = [
    "AttributeConfig",
    "AttributeField",
    "CubeConfig",
    "DenoisedCube",
    "FitOptions",
    "ImageConfig",
    "LineSearch",
    "LoFi",
    "LoFiSpec",
    "PlugAndPlayConfig",
    "Surface",
    "SurfaceConfig",
    "denoise",
    "denoise_cube",
    "fit_attributes",
    "fit_image",
    "fit_lofi",
    "fit_surface",
    "inpaint",
    "learn_geometry",
    "load_field",
    "load_lofi",
    "metrics",
    "plug_and_play",
    "recover_attributes",
    "upsample",
]
