r"""Linear operators from pictures to measured data: with adjoint, norm, and a closed-form proximal map where there is one.

Operators act on the last two axes of tensors (..., H, W), real or complex, and give (..., \*data_shape).
"""

from neurst.imaging.operators.astronomy import interferometer, lensing, shape_noise
from neurst.imaging.operators.base import Operator, adjoint_of
from neurst.imaging.operators.fourier import cartesian_mask, coil_maps, masked_fourier, multicoil
from neurst.imaging.operators.pictures import average, blur, identity, pixel_mask
from neurst.imaging.operators.tomography import filtered_back_projection, radon

__all__ = [
    "Operator",
    "adjoint_of",
    "average",
    "blur",
    "cartesian_mask",
    "coil_maps",
    "filtered_back_projection",
    "identity",
    "interferometer",
    "lensing",
    "masked_fourier",
    "multicoil",
    "pixel_mask",
    "radon",
    "shape_noise",
]
