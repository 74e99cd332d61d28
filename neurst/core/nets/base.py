"""What a network is, and networks side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from neurst.core.spec import Registry


class Network(ABC):
    """A network that can be named, stored and built."""

    @abstractmethod
    def build(self, n_in: int, n_out: int, generator: torch.Generator) -> nn.Module:
        """The module (N, n_in) -> (N, n_out) in float32, its initial weights drawn from `generator`."""

    @abstractmethod
    def n_weights(self, n_in: int, n_out: int) -> int:
        """The number of values in the ``state_dict()`` of the module, computed without building it.

        A stored network is built only if the file holds this many values, so that a damaged file cannot exhaust the memory.
        """


class ConcatNet(nn.Module):
    """Networks whose leading outputs are concatenated: (N, d) -> (N, m), tensor or jet.

    Parameters
    ----------
    nets
        The networks.
    widths
        Number of leading outputs taken from each network.
    """

    def __init__(self, nets: list[nn.Module], widths: list[int]):
        super().__init__()
        self.nets, self.widths = nn.ModuleList(nets), tuple(map(int, widths))

    def forward(self, x):
        return torch.cat([net(x)[..., :width] for net, width in zip(self.nets, self.widths, strict=True)], -1)


NETWORKS = Registry("network", "neurst.core.nets.NETWORKS", Network, "neurst.core.nets.Siren(width=64)")
