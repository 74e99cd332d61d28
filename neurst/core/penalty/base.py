"""What a derivative penalty is, and how it is evaluated on a field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from neurst.core.jet import Jet
from neurst.core.lattice import Lattice
from neurst.core.spec import Registry
from neurst.core.tensor_product import jet_at

norm = torch.linalg.vector_norm


class Penalty(ABC):
    """A number computed from the derivatives of a field. The methods other than ``__call__`` have defaults that suit most penalties."""

    order: ClassVar[int] = 1
    needs_spectrum: ClassVar[bool] = False  # whether the last axis of the coordinates must be a spectrum

    @abstractmethod
    def __call__(self, f: Jet) -> Tensor:  # -> ()
        """The penalty of a jet that was seeded with :attr:`order` and :meth:`directions`."""

    def directions(self, x: Tensor) -> Tensor | None:
        """Directions of the derivatives it needs at points `x` (N, d): (D, d) or (D, N, d); None means the coordinate axes."""
        return None

    def at(self, x: Tensor | Lattice) -> Penalty:
        """The penalty for use at points `x`. It is the penalty itself, unless it varies in space."""
        return self

    def n_outputs(self, n_channels: int, d: int) -> int:
        """Number of outputs that the network needs for a field with `n_channels` channels in d dimensions."""
        return n_channels

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> Penalty:
        """The penalty after adaptation to the current field at points `x`. It is the penalty itself, unless it is adaptive."""
        return self


def evaluate(penalty: Penalty, field: Callable, x: Tensor | Lattice) -> Tensor:  # -> ()
    """The penalty of a field (tensor in, tensor out; jet in, jet out) at points `x`, (N, d) or a lattice, in box units.

    Examples
    --------
    >>> import torch
    >>> from neurst.core.penalty import IsotropicTV
    >>> plane = torch.nn.Linear(2, 1)
    >>> x = torch.rand(9, 2)
    >>> bool(torch.isclose(evaluate(IsotropicTV(), plane, x), plane.weight.norm()))
    True
    """
    here = penalty.at(x)
    like = x if isinstance(x, Tensor) else torch.stack([axis[:1] for axis in x.axes], 1)
    return here(jet_at(field, x, here.directions(like), here.order))


PENALTIES = Registry("penalty", "neurst.core.penalty.PENALTIES", Penalty, "neurst.core.penalty.TGV(a0=0.1)")
