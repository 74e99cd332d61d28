r"""Derivative penalties: total variation of a field's exact derivatives (NeurTV :cite:p:`Luo2025`) and its relatives.

Every penalty is the **mean over regularisation points of the sum over channels** of derivatives in box units (or of a norm over
channels, where its name says so). All but :class:`Eikonal` are homogeneous of degree one in the field. A penalty states which derivatives
it needs (:attr:`Penalty.order`, :meth:`Penalty.directions`) and computes its value from a jet that holds them. The gradient of a norm at
zero is taken as zero; no small constant is added to it. :data:`PENALTIES` maps names to the penalties that need no further input.
"""

from neurst.core.penalty.adaptive import EdgeWeightedTV, PredictedTGV, SpaceVariantTV, WeightedTGV
from neurst.core.penalty.base import PENALTIES, Penalty, evaluate
from neurst.core.penalty.higher_order import TGV, Eikonal, HessianTV, HigherOrderTV, MixedTV
from neurst.core.penalty.tv import AnisotropicTV, DirectionalTV, IsotropicTV, NuclearTV, VectorialTV, WeightedTV

__all__ = [
    "PENALTIES",
    "TGV",
    "AnisotropicTV",
    "DirectionalTV",
    "EdgeWeightedTV",
    "Eikonal",
    "HessianTV",
    "HigherOrderTV",
    "IsotropicTV",
    "MixedTV",
    "NuclearTV",
    "Penalty",
    "PredictedTGV",
    "SpaceVariantTV",
    "VectorialTV",
    "WeightedTGV",
    "WeightedTV",
    "evaluate",
]
