"""Whether an operator does what it states: for the verbs that are given operators of users."""

from __future__ import annotations

import torch
from torch import Tensor

from neurst.core.check import adjoints_match
from neurst.imaging.operators.base import Operator

POWER_STEPS = 3  # of the power method, which find a stated norm that is much too small


def check_operator(operator: Operator, dtype: torch.dtype) -> None:
    """Raise a ValueError if an operator does not do what it states, for pictures of a type, one by one and in batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 1, *operator.shape), generator=generator, dtype=dtype)
    y = torch.randn((2, 1, *operator.data_shape), generator=generator, dtype=dtype)
    single = dtype in (torch.float32, torch.complex64)
    tolerance = 1e-4 if single else 1e-8
    try:
        image, back = operator.forward(x), operator.adjoint(y)
        alone = operator.forward(x[1, 0])
        near = None if operator.prox is None else operator.prox(x, y, 0.7)
        twice = back if operator.normal is None else operator.normal(x)
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
        msg = f"`operator` fails for pictures of {dtype} of shape {tuple(x.shape)} ({type(error).__name__}: {error}): expected functions of tensors (..., H, W) of single and double precision"
        raise ValueError(msg) from error
    for name, found, expected in (("forward", image, y.shape), ("adjoint", back, x.shape), ("normal", twice, x.shape)):
        if not isinstance(found, Tensor) or found.shape != expected:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            msg = f"`operator.{name}` gives {shape}: expected a tensor of shape {tuple(expected)}, as `shape` and `data_shape` say"
            raise ValueError(msg)
    if not float((image[1, 0] - alone).abs().max()) <= 100 * tolerance * float(alone.abs().max()):
        msg = "`operator.forward` gives a picture in a batch other data than the same picture alone: expected it to act on the last axes only"
        raise ValueError(msg)
    try:
        adjoints_match(lambda _: image, lambda _: back, x, y, rtol=tolerance)
    except AssertionError as error:
        msg = f"`operator`: {error}; expected `adjoint` to be the conjugate transpose of `forward`, see `neurst.imaging.operators.adjoint_of`"
        raise ValueError(msg) from None
    if near is not None:
        seen = y if operator.observed is None else y * operator.observed
        rest = 0.7 * operator.adjoint(operator.forward(near) - seen) + near - x
        if not float(rest.norm()) <= 100 * tolerance * float(x.norm()):
            msg = "`operator.prox(x, data, t)` does not solve t A'(A u - data) + u = x: expected the proximal map, or None"
            raise ValueError(msg)
    if operator.normal is not None:
        slow = operator.adjoint(image)
        if not float((twice - slow).norm()) <= 100 * tolerance * float(slow.norm()):
            msg = "`operator.normal(x)` is not the adjoint of `forward(x)`: expected A'A x, or None"
            raise ValueError(msg)
    power = x[:1]
    for _ in range(POWER_STEPS):
        size = power.norm()
        power = operator.adjoint(operator.forward(power / size)) if size > 0 else power
    found = float(power.norm()) ** 0.5
    if found > 1.001 * operator.norm:
        msg = f"`operator.norm={operator.norm:g}`: expected an upper bound on the spectral norm, which is at least {found:.4g}"
        raise ValueError(msg)
