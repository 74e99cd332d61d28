"""Members of the average: networks with a penalty on their derivatives, a Gaussian process, the constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neurst.core.arguments import POSITIVE, check_fields, number, several, shown, whole
from neurst.core.penalty import PENALTIES, Penalty
from neurst.core.spec import Registry


class Alternative:
    """A member of the average that is not a network with a penalty on its derivatives."""


ALTERNATIVES = Registry(
    "penalty", "neurst.spatial.priors.ALTERNATIVES", Alternative, "neurst.spatial.priors.GaussianProcess(functions=400)"
)


@ALTERNATIVES.register("gaussian_process")
@dataclass(frozen=True)
class GaussianProcess(Alternative):
    """Latent channels that are Gaussian processes, see :mod:`neurst.spatial.gaussian_process`.

    Parameters
    ----------
    lengths
        Candidates for the lengths of the kernels, in pitches: the d-th root of the volume of the bounding box for each spot.
    functions
        Number of functions of the cosine series, at most.
    margin
        Distance in box units by which the series extends beyond the bounding box.
    """

    lengths: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    functions: int = 576
    margin: float = 0.15

    def __post_init__(self):
        check_fields(self, lengths=several(POSITIVE), functions=whole(4), margin=number(0))


@ALTERNATIVES.register("constant")
@dataclass(frozen=True)
class Constant(Alternative):
    """The mean rate of each gene everywhere. It takes weight in the average where there is little to find."""


Prior = Penalty | Alternative
DEFAULT_PENALTIES = ("nuclear", "space_variant", "gaussian_process", "constant")
# of sections so large that the space-variant penalty is left out to save time
LARGE_PENALTIES = ("nuclear", "gaussian_process", "constant")
POSITION_PENALTIES = tuple(
    sorted([*(name for name, cls in PENALTIES.items() if not cls.needs_spectrum), *ALTERNATIVES])
)


def prior_to_dict(prior: Prior) -> dict[str, Any]:
    """The name and numbers of a penalty, or of another member of the average, as plain values."""
    return (ALTERNATIVES if isinstance(prior, Alternative) else PENALTIES).to_dict(prior)


def prior_from_dict(stored: Mapping[str, Any]) -> Prior:
    """The inverse of :func:`prior_to_dict`."""
    return (ALTERNATIVES if str(stored["name"]) in ALTERNATIVES else PENALTIES).from_dict(stored)


def named_penalties(penalty: str | Prior | Sequence[str | Prior]) -> tuple[Prior, ...]:
    """The penalties and other members that are averaged, without duplicates.

    Raises
    ------
    TypeError, ValueError
        If one of them is unknown, needs a spectral axis, or cannot be stored, or if there is no field among them.
    """
    if isinstance(penalty, str) and penalty == "auto":
        penalty = DEFAULT_PENALTIES
    several = tuple(penalty) if isinstance(penalty, Sequence) and not isinstance(penalty, str) else (penalty,)
    choices = f"expected 'auto' alone, or one or more of {list(POSITION_PENALTIES)} or of specifications such as `{PENALTIES.example}`"
    out = []
    for each in several:
        name = each if isinstance(each, str) else None
        if name not in (None, *PENALTIES, *ALTERNATIVES) or not isinstance(each, (str, Prior)):
            msg = f"`penalty={shown(penalty)}`: {choices}"
            raise (TypeError if name is None else ValueError)(msg)
        spec = (ALTERNATIVES if isinstance(each, Alternative) or name in ALTERNATIVES else PENALTIES).get_spec(each)
        if isinstance(spec, Penalty) and spec.needs_spectrum:
            msg = f"`penalty={shown(each)}` is for cubes with a spectral axis, which positions lack: {choices}"
            raise ValueError(msg)
        prior_to_dict(spec)  # raises now, not after the fit, if the penalty cannot be stored
        out.append(spec)
    if all(isinstance(spec, Constant) for spec in out):
        msg = f"`penalty={penalty!r}` names no field that could be fitted: {choices}"
        raise ValueError(msg)
    return tuple(dict.fromkeys(out))
