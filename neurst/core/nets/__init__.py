r"""Coordinate networks on the unit box, each layer written once for tensor and jet.

A network is a frozen specification of plain numbers, so that it can be stored in a file. Its method
``build(n_in, n_out, generator)`` gives the ``nn.Module`` that maps (N, n_in) coordinates in [-1, 1] to (N, n_out).
:data:`NETWORKS` maps names to networks.
"""

from neurst.core.nets.base import NETWORKS, ConcatNet, Network
from neurst.core.nets.basis import Bumps, Cosine, Spline
from neurst.core.nets.dense import Fourier, LowRank, Sine, Siren

__all__ = [
    "Bumps",
    "ConcatNet",
    "Cosine",
    "Fourier",
    "LowRank",
    "NETWORKS",
    "Network",
    "Sine",
    "Siren",
    "Spline",
]
