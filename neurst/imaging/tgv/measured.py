"""Measured data as a batch of tensors: what the classic and the learned solvers read in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurst.core.arguments import NONE, instance, plain_array
from neurst.imaging.arrays import noise_level
from neurst.imaging.operators import Operator, identity
from neurst.imaging.operators.checks import check_operator
from neurst.imaging.tgv.problem import State

OPERATOR = (NONE | instance(Operator, "a `neurst.imaging.operators.Operator`")).advised(
    "None is denoising; make one with a function of `neurst.imaging.operators`"
)


@dataclass(frozen=True, eq=False)
class Measured:
    r"""Data in units in which nothing over- or underflows, and steps of the solver do not depend on the user's units.

    With n the norm of A, m the constant picture whose data are nearest to f, and c the largest modulus of :math:`(f - A m) / n`, the solver sees the data
    :math:`(f - A m) / (n c)`, the operator :math:`A / n`, pictures :math:`(u - m) / c`, weights :math:`L / (n^2 c)` and noise :math:`\sigma / (n c)`. Constants cost nothing, so
    the solution is the same.

    Parameters
    ----------
    batch
        (B, C, \*data_shape), float or complex, in single or double precision; 0 where nothing is observed.
    operator
        A / n.
    extra
        Axes of the user's array beyond those of one grey picture: 0, 1 (channels, last) or 2 (and a batch, first).
    norm, scale
        n and c.
    mean
        (B, C, 1, 1) m.
    """

    batch: Tensor
    operator: Operator
    extra: int
    norm: float
    scale: float
    mean: Tensor

    @classmethod
    def read(cls, data: Any, operator: Operator | None) -> Measured:
        """Data of a user; None is the identity.

        Raises
        ------
        TypeError, ValueError
            For data of a wrong type or shape or that are not finite, and for an operator whose adjoint or norm is wrong.
        """
        values = _numbers(data)
        shape = (None, None) if operator is None else tuple(operator.data_shape)
        extra = values.ndim - len(shape)
        here = values.shape[extra == 2 :][: len(shape)]
        if extra not in (0, 1, 2) or 0 in values.shape or (operator is not None and here != shape):
            one = "H, W" if operator is None else ", ".join(map(str, shape))
            msg = f"`data` has shape {values.shape}: expected ({one}), ({one}, C) or (B, {one}, C)"
            raise ValueError(msg + ("" if operator is None else ", which is what the operator gives"))
        operator = identity(here) if operator is None else operator
        if operator.complex:
            values = values.astype(np.result_type(values.dtype, np.complex64), copy=False)
        if operator.observed is not None:
            seen = np.broadcast_to(operator.observed.numpy(), shape)
            values = np.where(seen[..., None] if extra else seen, values, 0)
        bad = ~np.isfinite(values)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            msg = f"`data` is not finite at {bad.sum()} entries (first: {first}): leave them out with `operator=pixel_mask(...)`, or fill them"
            raise ValueError(msg)
        values = values if extra else values[..., None]
        values = np.moveaxis(values if extra == 2 else values[None], -1, 1)
        # a copy, so that nobody else's changes reach the solution
        batch = torch.from_numpy(np.array(values, order="C"))
        check_operator(operator, batch.dtype)
        like = torch.complex128 if batch.is_complex() else torch.float64
        like = torch.complex128 if batch.is_complex() else torch.float64
        exact = batch.to(like)
        mean = nearest_constant(operator, exact)
        centred = exact - operator.forward(mean.expand(*mean.shape[:2], *operator.shape))
        scale = float(centred.abs().max()) / operator.norm or 1.0
        return cls(
            (centred / (operator.norm * scale)).to(batch.dtype),
            operator.normalised(),
            extra,
            operator.norm,
            scale,
            mean,
        )

    @property
    def weight(self) -> float:
        """What weights are divided by."""
        return self.norm**2 * self.scale

    @property
    def noise(self) -> float:
        """What noise levels are divided by."""
        return self.norm * self.scale

    def to_user(self, state: State) -> State:
        """All variables in the units of the user."""
        u, w, p, q = state
        u = (self.mean + self.scale * u).to(u.dtype)
        scaled = lambda part, unit: None if part is None else part * unit
        return State(u, scaled(w, self.scale), scaled(p, self.weight), scaled(q, self.weight))

    def from_user(self, state: State) -> State:
        """The inverse of :meth:`to_user`, in the type of the data."""
        u, w, p, q = state
        scaled = lambda part, unit: None if part is None else (part / unit).to(self.batch.dtype)
        return State(
            scaled(u - self.mean, self.scale), scaled(w, self.scale), scaled(p, self.weight), scaled(q, self.weight)
        )

    def pictures(self, u: Tensor) -> NDArray:
        """Pictures (B, C, H, W) with the axes of the user's array; further axes stay last."""
        out = u.movedim(1, 3).numpy().copy()
        out = out if self.extra else out[:, :, :, 0]
        return out if self.extra == 2 else out[0]

    def noise_level(self) -> float:
        """The noise level of real pixels, estimated, in the units of the user. Raises a ValueError for other data, and if there seems to be no noise."""
        operator, real = self.operator, not self.batch.is_complex()
        if (
            not real
            or operator.shape != operator.data_shape
            or (operator.observed is None and not operator.is_identity)
        ):
            msg = "`sigma=None`: the noise level can only be estimated from pixels of a real picture; pass the standard deviation of the noise"
            raise ValueError(msg)
        images = self.batch.movedim(1, 3).numpy()
        seen = (
            None
            if operator.observed is None
            else np.broadcast_to(operator.observed.numpy()[..., None], images.shape[1:])
        )
        found = self.noise * float(np.mean([noise_level(image, seen) for image in images]))
        if not found > 0:
            msg = "`sigma=None`: the estimated noise level is 0, and data without noise need no smoothing; pass `sigma`, or weights"
            raise ValueError(msg)
        return found


def _numbers(data: Any) -> NDArray:
    """An array of floats or complex numbers, in single or double precision."""
    advice = "pass the measured data, without an operator a picture (H, W) or (H, W, C)"
    values = plain_array("data", data, advice=advice)
    if values.dtype.kind in "bu":
        values = values / (1.0 if values.dtype == bool else np.iinfo(values.dtype).max)
    if values.dtype.kind not in "fc":
        msg = f"`data` holds {values.dtype}: expected floats, complex numbers, or unsigned integers, which are scaled to [0, 1]"
        raise TypeError(msg)
    single = values.dtype in (np.float16, np.float32, np.complex64)
    if values.dtype.kind == "f":
        return values.astype(np.float32 if single else np.float64, copy=False)
    return values.astype(np.complex64 if single else np.complex128, copy=False)


def nearest_constant(operator: Operator, data: Tensor) -> Tensor:  # -> (B, C, 1, 1)
    """The constant picture whose data are nearest to data (B, C, ...) in the sense of least squares."""
    one = operator.forward(torch.ones(operator.shape, dtype=data.dtype, device=data.device))
    product = (one.conj() * data).flatten(2).sum(2)[..., None, None]
    return product / one.abs().square().sum().clamp_min(torch.finfo(data.dtype).tiny)
