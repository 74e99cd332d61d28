"""What an operator is, checks of the arguments that all of them share, and an adjoint for operators that have none of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neurst.core.arguments import number, plain_array, shown, whole

Prox = Callable[[Tensor, Tensor, Tensor | float], Tensor]


@dataclass(frozen=True, eq=False)
class Operator:
    r"""A linear operator A.

    Parameters
    ----------
    shape
        (H, W) of a picture.
    data_shape
        Shape of the data of one picture.
    forward, adjoint
        A from (..., H, W) to (..., \*data_shape), and its adjoint, for tensors in single and double precision.
    norm
        The spectral norm, or an upper bound on it.
    prox
        ``prox(x, data, t)``: the u that minimises :math:`\tfrac{t}{2} \|A u - \mathrm{data}\|^2 + \tfrac12 \|u - x\|^2`. None if it has no closed form.
    observed
        True at the entries of the data that are measured, in a shape that broadcasts to `data_shape`; None if all are.
    complex
        Whether pictures are complex.
    is_identity
        Whether A is the identity, for which the duality gap is known.
    normal
        A'A from (..., H, W) to (..., H, W), where there is a faster way than the adjoint of `forward`; None if there is none.

    Examples
    --------
    >>> import torch
    >>> crop = Operator((3, 4), (3, 2), lambda u: u[..., :2], lambda y: torch.nn.functional.pad(y, (0, 2)), norm=1.0)
    >>> crop.forward(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    shape: tuple[int, int]
    data_shape: tuple[int, ...]
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    norm: float
    prox: Prox | None = None
    observed: Tensor | None = None
    complex: bool = False
    is_identity: bool = False
    normal: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        object.__setattr__(self, "shape", picture_shape("Operator.shape", self.shape))
        sizes = tuple(self.data_shape) if isinstance(self.data_shape, (tuple, list)) else (self.data_shape,)
        data_shape = tuple(whole(1)(f"Operator.data_shape[{k}]", n) for k, n in enumerate(sizes))
        object.__setattr__(self, "data_shape", data_shape)
        number(0, above=True)("Operator.norm", self.norm)
        for name in ("forward", "adjoint", "prox", "normal"):
            if not (callable(getattr(self, name)) or (name in ("prox", "normal") and getattr(self, name) is None)):
                msg = f"`Operator.{name}={shown(getattr(self, name))}`: expected a function of tensors"
                raise TypeError(msg)
        if self.observed is not None:
            observed = torch.as_tensor(self.observed, dtype=torch.bool).clone()
            object.__setattr__(self, "observed", observed)
            try:
                observed.expand(self.data_shape)
            except RuntimeError:
                msg = f"`Operator.observed` has shape {tuple(observed.shape)}: expected one that broadcasts to `data_shape`, {self.data_shape}"
                raise ValueError(msg) from None

    def normalised(self) -> Operator:
        """The operator divided by its norm, for data that are divided by it too."""
        n = self.norm
        if n == 1:
            return self
        prox = None if self.prox is None else lambda x, data, t: self.prox(x, n * data, t / n**2)
        forward, adjoint = (lambda u: self.forward(u) / n), (lambda y: self.adjoint(y) / n)
        normal = None if self.normal is None else lambda u: self.normal(u) / n**2
        return dataclasses.replace(self, forward=forward, adjoint=adjoint, norm=1.0, prox=prox, normal=normal)

    def apply_normal(self, u: Tensor) -> Tensor:  # (..., H, W) -> (..., H, W)
        """A'A u."""
        return self.adjoint(self.forward(u)) if self.normal is None else self.normal(u)

    @property
    def n_observed(self) -> int:
        """Number of measured entries of the data of one picture."""
        total = math.prod(self.data_shape)
        return total if self.observed is None else int(self.observed.expand(self.data_shape).sum())


def picture_shape(name: str, value: object) -> tuple[int, int]:
    """The sides (H, W) of a picture, checked."""
    try:
        rows, columns = value
    except (TypeError, ValueError):
        msg = f"`{name}={shown(value)}`: expected (H, W), the sides of the picture in pixels"
        raise TypeError(msg) from None
    return whole(1)(f"{name}[0]", rows), whole(1)(f"{name}[1]", columns)


def picture_mask(mask: ArrayLike) -> Tensor:
    """A mask (H, W) of booleans that are not all False, checked."""
    mask = plain_array("mask", mask)
    if mask.dtype != bool or mask.ndim != 2:
        msg = f"`mask` is an array of {mask.dtype} of shape {mask.shape}: expected booleans (H, W), True where there are data"
        raise (TypeError if mask.dtype != bool else ValueError)(msg)
    if not mask.any():
        msg = f"`mask` of shape {mask.shape} is False everywhere: expected some data"
        raise ValueError(msg)
    return torch.from_numpy(mask.copy())


def adjoint_of(forward: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The adjoint of a linear function of real pictures (..., H, W), by automatic differentiation.

    Examples
    --------
    >>> import torch
    >>> adjoint_of(lambda u: u[..., :2], (3, 4))(torch.ones(3, 2)).sum(1)
    tensor([2., 2., 2.])
    """
    n_axes = forward(torch.zeros(shape, dtype=torch.float64)).ndim

    def adjoint(y: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            lead = y.shape[: y.ndim - n_axes]
            u = y.new_zeros((*lead, *shape)).requires_grad_()
            return torch.autograd.grad((forward(u) * y).sum(), u, create_graph=y.requires_grad)[0]

    return adjoint
