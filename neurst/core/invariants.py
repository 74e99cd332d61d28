r"""Numbers made of all derivatives of a function at a point that do not change when the function is turned about the point."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from neurst.core.arguments import POSITIVE
from neurst.core.table import Table, multi_indices

HIGHEST_SOLID = 2  # order in three dimensions


def invariants(found: Table, *, floor: float = 1e-6) -> Tensor:  # -> (N, C, I)
    r"""A complete set of rotation invariants of the derivatives of each channel, in two dimensions to any order, in three to the second.

    In the plane, with :math:`\partial = (\partial_1 - i \partial_2) / 2` and :math:`w_{pq} = \partial^p \bar\partial^q f`, a turn by :math:`\varphi` multiplies :math:`w_{pq}` by :math:`e^{i (p - q) \varphi}`. The invariants are :math:`w_{pp}`,
    :math:`|w_{10}|`, and for p > q, p + q > 1 the real and imaginary parts of :math:`w_{pq} \left(\bar w_{10} / \sqrt{|w_{10}|^2 + \epsilon^2}\right)^{p - q}`: one number less than there are derivatives. In space, with gradient g and Hessian H, they are
    :math:`f, |g|, \mathrm{tr} H, \mathrm{tr} H^2, \mathrm{tr} H^3, g^\top H g, g^\top H^2 g`.

    Norms of all derivatives of an order are invariant too if mixed ones are counted as often as they occur, which those of :cite:p:`Xu2022` are not.

    Parameters
    ----------
    found
        The derivatives, of functions of two or three variables.
    floor
        :math:`\epsilon`, in the units of the gradient: the direction of smaller gradients fades out.

    Raises
    ------
    ValueError
        If the number of variables is not 2 or 3, or the order in three variables is above 2.

    Examples
    --------
    >>> from neurst.core.table import table
    >>> x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    >>> bowl = lambda u: u[..., :1] * u[..., :1] + u[..., 1:] * u[..., 1:]
    >>> invariants(table(bowl, x, 2)).round(decimals=4)  # f, Laplacian / 4, |gradient| / 2, and what is not isotropic
    tensor([[[0.1300, 1.0000, 0.3606, 0.0000, 0.0000]]], dtype=torch.float64)
    """
    floor = POSITIVE("floor", floor)
    derivatives = found.derivatives()  # (M, N, C)
    if found.n_dims == 2:
        return _planar(derivatives, found.order, floor)
    if found.n_dims != 3 or found.order > HIGHEST_SOLID:
        msg = f"the table has {found.n_dims} variables and the order {found.order}: expected 2 variables, or 3 and an order of at most {HIGHEST_SOLID}"
        raise ValueError(msg)
    return _solid(derivatives, found.order)


def _planar(derivatives: Tensor, order: int, floor: float) -> Tensor:
    kept = {}
    for p, q, weights in _wirtinger(order):
        kept[p, q] = torch.einsum(
            "m,mnc->nc", weights.to(derivatives.device, _complex(derivatives)), derivatives.to(_complex(derivatives))
        )
    parts = [kept[p, p].real for p in range(order // 2 + 1)]
    if order:
        gradient = kept[1, 0]
        parts.append(gradient.abs())
        turn = gradient.conj() / (gradient.abs().square() + floor**2).sqrt()
        for (p, q), w in kept.items():
            if p > q and p + q > 1:
                turned = w * turn ** (p - q)
                parts += [turned.real, turned.imag]
    return torch.stack(parts, -1)


def _complex(like: Tensor) -> torch.dtype:
    return torch.complex128 if like.dtype == torch.float64 else torch.complex64


@functools.cache
def _wirtinger(order: int) -> list[tuple[int, int, Tensor]]:
    """For p >= q with p + q at most an order, the weights (M,) of the derivatives in w_pq."""
    place = {alpha: k for k, alpha in enumerate(multi_indices(2, order))}
    out = []
    for total in range(order + 1):
        for q in range(total // 2 + 1):
            p = total - q
            weights = torch.zeros(len(place), dtype=torch.complex128)
            for a in range(p + 1):  # of p factors d_1 - i d_2, a give -i d_2; of q factors d_1 + i d_2, b give i d_2
                for b in range(q + 1):
                    factor = math.comb(p, a) * math.comb(q, b) * (-1j) ** a * 1j**b
                    weights[place[total - a - b, a + b]] += factor / 2**total
            out.append((p, q, weights))
    return out


def _solid(derivatives: Tensor, order: int) -> Tensor:
    parts = [derivatives[0]]
    if order >= 1:
        gradient = derivatives[1:4].movedim(0, -1)  # (N, C, 3)
        parts.append(gradient.norm(dim=-1))
    if order == 2:
        xx, xy, xz, yy, yz, zz = derivatives[4:].unbind(0)
        hessian = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).unflatten(-1, (3, 3))
        trace = lambda m: m.diagonal(dim1=-2, dim2=-1).sum(-1)
        square = hessian @ hessian
        along = lambda m: torch.einsum("nci,ncij,ncj->nc", gradient, m, gradient)
        parts += [trace(hessian), trace(square), trace(square @ hessian), along(hessian), along(square)]
    return torch.stack(parts, -1)
