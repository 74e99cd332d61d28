r"""Differences of pictures on a grid of unit pitch, and their adjoints.

Pictures are tensors (..., H, W), real or complex; leading axes are batch and channels. A difference is 0 where one of its two ends does
not exist, so the differences of an affine picture are constant or 0, also at the border.
"""

from __future__ import annotations

import math

from torch import Tensor

GRAD_NORM = math.sqrt(8)  # bound on the spectral norms of `grad` and `symgrad`
ROOT_HALF = math.sqrt(0.5)


def grad(u: Tensor) -> Tensor:  # (..., H, W) -> (..., 2, H, W)
    """Forward differences along rows and columns, 0 at the last row and at the last column."""
    out = u.new_zeros((*u.shape[:-2], 2, *u.shape[-2:]))
    out[..., 0, :-1, :] = u[..., 1:, :] - u[..., :-1, :]
    out[..., 1, :, :-1] = u[..., :, 1:] - u[..., :, :-1]
    return out


def grad_adjoint(p: Tensor) -> Tensor:  # (..., 2, H, W) -> (..., H, W)
    """The adjoint of :func:`grad`, which is the negative divergence. Entries that `grad` sets to 0 are not read."""
    rows, columns = p[..., 0, :-1, :], p[..., 1, :, :-1]
    out = p.new_zeros((*p.shape[:-3], *p.shape[-2:]))
    out[..., :-1, :] -= rows
    out[..., 1:, :] += rows
    out[..., :, :-1] -= columns
    out[..., :, 1:] += columns
    return out


def symgrad(w: Tensor) -> Tensor:  # (..., 2, H, W) -> (..., 3, H, W)
    r"""The symmetrised gradient :math:`\tfrac12 (\nabla w + \nabla w^\top)` of a vector field, by backward differences.

    The components are :math:`E_{11}, E_{22}, \sqrt2 E_{12}`, so that their Euclidean norm is the Frobenius norm of the symmetric matrix. The
    field is that of :func:`grad`: its first component does not exist on the last row, nor the second on the last column.
    """
    first, second = w[..., 0, :, :], w[..., 1, :, :]
    out = w.new_zeros((*w.shape[:-3], 3, *w.shape[-2:]))
    out[..., 0, 1:-1, :] = first[..., 1:-1, :] - first[..., :-2, :]
    out[..., 1, :, 1:-1] = second[..., :, 1:-1] - second[..., :, :-2]
    out[..., 2, :-1, 1:] = ROOT_HALF * (first[..., :-1, 1:] - first[..., :-1, :-1])
    out[..., 2, 1:, :-1] += ROOT_HALF * (second[..., 1:, :-1] - second[..., :-1, :-1])
    return out


def symgrad_adjoint(q: Tensor) -> Tensor:  # (..., 3, H, W) -> (..., 2, H, W)
    """The adjoint of :func:`symgrad`."""
    out = q.new_zeros((*q.shape[:-3], 2, *q.shape[-2:]))
    rows, columns = q[..., 0, 1:-1, :], q[..., 1, :, 1:-1]
    along, across = ROOT_HALF * q[..., 2, :-1, 1:], ROOT_HALF * q[..., 2, 1:, :-1]
    first, second = out[..., 0, :, :], out[..., 1, :, :]
    first[..., 1:-1, :] += rows
    first[..., :-2, :] -= rows
    second[..., :, 1:-1] += columns
    second[..., :, :-2] -= columns
    first[..., :-1, 1:] += along
    first[..., :-1, :-1] -= along
    second[..., 1:, :-1] += across
    second[..., :-1, :-1] -= across
    return out
