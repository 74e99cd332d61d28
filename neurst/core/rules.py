r"""One Taylor rule per torch op, in four families: constant, linear, bilinear, recurrence.

Every derivative formula of the package is in this module. With ``u = sum_k u_k t^k`` and a function that
satisfies an ordinary differential equation, the coefficients of the result follow from
``y' = g u'  =>  k y_k = sum_{j=1..k} j u_j g_{k-j}`` :cite:p:`Griewank2008`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from neurst.core.jet import RULES, Jet, rule


def _jet(coefs: list[Tensor]) -> Jet:
    return Jet(coefs[0], coefs[1].unsqueeze(0) if len(coefs) == 2 else torch.stack(coefs[1:]))


# Constant family: the derivative of a piecewise constant op is zero, so the result is a plain tensor.


@rule(torch.floor)
def _floor(u: Jet) -> Tensor:
    return u.value.floor()


# Linear family: the op acts on each coefficient separately. Axes are counted from the end, where value and terms agree.


def _trailing(op: Callable) -> Callable:
    def apply(u: Jet, dim: int, *args) -> Jet:
        if not isinstance(dim, int) or dim >= 0:
            msg = f"`{op.__name__}` of a jet needs a negative `dim`, counted from the channels; got {dim!r}"
            raise TypeError(msg)
        return Jet(op(u.value, dim, *args), op(u.terms, dim, *args))

    return apply


for _op in (torch.sum, torch.unsqueeze, torch.flatten, torch.unflatten):
    RULES[_op] = _trailing(_op)


@rule(F.linear)
def _linear(u: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    return Jet(F.linear(u.value, weight, bias), F.linear(u.terms, weight))


@rule(torch.einsum)
def _einsum(equation: str, u: Jet, *tensors: Tensor) -> Jet:
    """A contraction of one jet with tensors, written ``"...nk,nkc->...nc"``."""
    return Jet(torch.einsum(equation, u.value, *tensors), torch.einsum(equation, u.terms, *tensors))


@rule(torch.neg)
def _neg(u: Jet) -> Jet:
    return Jet(-u.value, -u.terms)


@rule(torch.add)
def _add(u: Jet | Tensor | float, v: Jet | Tensor | float) -> Jet:
    if isinstance(u, Jet) and isinstance(v, Jet):
        return Jet(u.value + v.value, u.terms + v.terms)
    u, v = (u, v) if isinstance(u, Jet) else (v, u)
    value = u.value + v
    return Jet(value, u.terms.to(value).expand(*u.terms.shape[:2], *value.shape))


@rule(torch.sub)
def _sub(u: Jet | Tensor | float, v: Jet | Tensor | float) -> Jet:
    return _add(u, -v)


@rule(torch.cat)
def _cat(jets: list[Jet], dim: int) -> Jet:
    if dim >= 0:
        msg = f"`cat` of jets needs a negative `dim`, counted from the channels; got {dim!r}"
        raise TypeError(msg)
    if not all(isinstance(u, Jet) for u in jets):
        msg = f"`cat` takes jets only, got {[type(u).__name__ for u in jets]}: concatenate before seeding"
        raise TypeError(msg)
    return Jet(torch.cat([u.value for u in jets], dim), torch.cat([u.terms for u in jets], dim))


# Bilinear family: the Leibniz rule, c_k = sum_j a_j b_{k-j}.


def _leibniz(a: list[Tensor], b: list[Tensor], k: int) -> Tensor:
    return sum(a[j] * b[k - j] for j in range(k + 1))


@rule(torch.mul)
def _mul(u: Jet | Tensor | float, v: Jet | Tensor | float) -> Jet:
    if isinstance(u, Jet) and isinstance(v, Jet):
        a, b = u.coefs, v.coefs
        return _jet([_leibniz(a, b, k) for k in range(len(a))])
    u, v = (u, v) if isinstance(u, Jet) else (v, u)
    return Jet(u.value * v, u.terms * v)


@rule(torch.div)
def _div(u: Jet | Tensor | float, v: Jet | Tensor | float) -> Jet:
    return _mul(u, _reciprocal(v) if isinstance(v, Jet) else 1 / v)


# Recurrence family: coefficient k follows from those before it.


def _integrate(y0: Tensor, u: list[Tensor], g: Callable[[list[Tensor], int], Tensor]) -> list[Tensor]:
    """Coefficients of y with ``y' = g u'``; `g(y, k)` gives coefficient k of g once y_0 .. y_k are known."""
    y, gs = [y0], []
    for k in range(1, len(u)):
        gs.append(g(y, k - 1))
        y.append(sum(j * u[j] * gs[k - j] for j in range(1, k + 1)) / k if k > 1 else u[1] * gs[0])
    return y


def _sin_cos(u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    # s' = c u' and c' = -s u'   =>   k s_k = sum_j j u_j c_{k-j},   k c_k = -sum_j j u_j s_{k-j}
    s, c = [u[0].sin()], [u[0].cos()]
    for k in range(1, len(u)):
        s_k = sum(j * u[j] * c[k - j] for j in range(1, k + 1)) / k if k > 1 else u[1] * c[0]
        if k + 1 < len(u):  # no s_k needs c_K
            c.append(-sum(j * u[j] * s[k - j] for j in range(1, k + 1)) / k)
        s.append(s_k)
    return s, c


@rule(torch.sin)
def _sin(u: Jet) -> Jet:
    return _jet(_sin_cos(u.coefs)[0])


@rule(torch.cos)
def _cos(u: Jet) -> Jet:
    # cos u = sin(u + pi / 2)
    return _sin(_add(u, math.pi / 2))


@rule(torch.exp)
def _exp(u: Jet) -> Jet:
    # y' = y u'
    return _jet(_integrate(u.value.exp(), u.coefs, lambda y, k: y[k]))


@rule(torch.tanh)
def _tanh(u: Jet) -> Jet:
    # y' = (1 - y^2) u'
    return _jet(_integrate(u.value.tanh(), u.coefs, lambda y, k: (1 if k == 0 else 0) - _leibniz(y, y, k)))


@rule(torch.sigmoid)
def _sigmoid(u: Jet) -> Jet:
    # y' = (y - y^2) u'
    return _jet(_integrate(u.value.sigmoid(), u.coefs, lambda y, k: y[k] - _leibniz(y, y, k)))


@rule(F.softplus)
def _softplus(u: Jet, beta: float = 1.0, threshold: float = 20.0) -> Jet:
    # y' = sigmoid(beta u) u'; beyond the threshold, where torch returns u, the slope is 1 up to exp(-threshold)
    if threshold < 15:
        msg = f"`softplus(threshold={threshold})` has a step in its slope: use 20, the default"
        raise TypeError(msg)
    g = _sigmoid(_mul(u, beta)).coefs
    return _jet(_integrate(F.softplus(u.value, beta, threshold), u.coefs, lambda _, k: g[k]))


@rule(F.silu)
def _silu(u: Jet, inplace: bool = False) -> Jet:
    return _mul(u, _sigmoid(u))


@rule(F.gelu)
def _gelu(u: Jet, approximate: str = "none") -> Jet:
    # u Phi(u), Phi' = exp(-u^2 / 2) / sqrt(2 pi) u'
    if approximate != "none":
        msg = f"`gelu(approximate={approximate!r})` has no Taylor rule: use the exact form, approximate='none'"
        raise TypeError(msg)
    density = _exp(_mul(_mul(u, u), -0.5)).coefs
    cdf = _integrate(torch.special.ndtr(u.value), u.coefs, lambda _, k: density[k] / math.sqrt(2 * math.pi))
    return _mul(u, _jet(cdf))


@rule(torch.log)
def _log(u: Jet) -> Jet:
    # y' = u' / u
    g = _reciprocal(u).coefs
    return _jet(_integrate(u.value.log(), u.coefs, lambda _, k: g[k]))


@rule(torch.reciprocal)
def _reciprocal(u: Jet) -> Jet:
    # u y = 1   =>   y_k = -sum_{j>=1} u_j y_{k-j} / u_0
    a, y = u.coefs, [1 / u.value]
    for k in range(1, len(a)):
        y.append(-y[0] * sum(a[j] * y[k - j] for j in range(1, k + 1)))
    return _jet(y)


@rule(torch.sqrt)
def _sqrt(u: Jet) -> Jet:
    # y^2 = u   =>   2 y_0 y_k = u_k - sum_{0<j<k} y_j y_{k-j}
    a, y = u.coefs, [u.value.sqrt()]
    for k in range(1, len(a)):
        y.append((a[k] - sum(y[j] * y[k - j] for j in range(1, k))) / (2 * y[0]))
    return _jet(y)


@rule(torch.pow)
def _pow(u: Jet, exponent: int) -> Jet:
    if not isinstance(exponent, int) or exponent < 1:
        msg = f"`pow` of a jet takes a whole exponent >= 1, got {exponent!r}: use sqrt, reciprocal, or exp and log"
        raise TypeError(msg)
    out = u
    for _ in range(exponent - 1):
        out = _mul(out, u)
    return out


# Piecewise linear ops have exact slopes. Higher orders raise an error, as a Hessian of zero would be a wrong answer.


def _piecewise_linear(op: Callable, slope: Callable[[Tensor], Tensor]) -> Callable:
    def apply(u: Jet, inplace: bool = False) -> Jet:
        if u.order > 1:
            msg = (
                f"`{op.__name__}` is piecewise linear: its derivative of order {u.order} is zero almost everywhere "
                "and says nothing; use a smooth activation (sin, tanh, softplus, silu, gelu)"
            )
            raise TypeError(msg)
        return Jet(op(u.value), u.terms * slope(u.value))

    return apply


for _op in (torch.relu, F.relu):
    RULES[_op] = _piecewise_linear(_op, lambda x: (x > 0).to(x.dtype))
RULES[torch.abs] = _piecewise_linear(torch.abs, torch.sign)
