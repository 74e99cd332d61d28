"""Checks of arguments: one rule for each argument, one table of rules for each public function.

A rule is called as ``rule(name, value)``. It returns the value as a plain Python type (a NumPy integer becomes an `int`, a
list of names a tuple), or raises an error that names the argument, the value found, what was expected, and what to do.
``a | b`` accepts a value that either rule accepts. :func:`checked` applies a table of rules to a function.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 1e100  # larger numbers are rejected as mistakes: sums of their squares could overflow
LONGEST_SHOWN = 80  # most characters of a value in an error message


def shown(value: Any) -> str:
    """A value as an error shows it: in full if short, else its type, and its shape if it has one."""
    if isinstance(value, np.generic):
        value = value.item()  # np.float64(3.0) is shown as 3.0
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"<{type(value).__name__} of shape {tuple(shape)}>"
    text = repr(value)
    if len(text) <= LONGEST_SHOWN and "\n" not in text:
        return text
    return f"<{type(value).__name__}>" if shape is None else f"<{type(value).__name__} of shape {shape}>"


def warn(message: str) -> None:
    """Issue a `UserWarning` that points at the caller's line: the first one outside neurst."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "neurst":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=depth)


@dataclass(frozen=True)
class Rule:
    """What an argument may be.

    Parameters
    ----------
    options
        Descriptions of the accepted values. Each completes the phrase "expected ...".
    read
        Converts a value to its plain type. Raises TypeError for a wrong type and ValueError for a value out of range.
    advice
        What the user should do, if the options do not make it clear.
    """

    options: tuple[str, ...]
    read: Callable[[Any], Any]
    advice: str = ""

    @property
    def expected(self) -> str:
        """The options in one phrase: ``"None, 'auto' or a whole number >= 1"``."""
        *first, last = self.options
        return f"{', '.join(first)} or {last}" if first else last

    def __call__(self, name: str, value: Any) -> Any:
        """The value in its plain type, or an error that names the argument."""
        try:
            return self.read(value)
        except (TypeError, ValueError, OverflowError) as error:
            found = f" ({error})" if str(error) else ""
            advice = f"; {self.advice}" if self.advice else ""
            msg = f"`{name}={shown(value)}`: expected {self.expected}{found}{advice}"
            raise (TypeError if isinstance(error, TypeError) else ValueError)(msg) from None

    def __or__(self, other: Rule) -> Rule:
        def read(value: Any) -> Any:
            try:
                return self.read(value)
            except (TypeError, ValueError, OverflowError) as first:
                try:
                    return other.read(value)
                except TypeError:  # the first error may say more: that the type is right but the value out of range
                    raise first from None

        return Rule(self.options + other.options, read, self.advice or other.advice)

    def advised(self, advice: str) -> Rule:
        """The same rule with other advice."""
        return dataclasses.replace(self, advice=advice)


def whole(least: int = 0, most: int | None = None) -> Rule:
    """A whole number from `least` to `most`."""

    def read(value: Any) -> int:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
            raise TypeError
        if value < least or (most is not None and value > most):
            raise ValueError
        return int(value)

    return Rule((f"a whole number >= {least}" + ("" if most is None else f" and <= {most:,}"),), read)


def number(least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> Rule:
    """A finite number that is at least `least` (greater than it if `above`) and at most `most`."""

    def read(value: Any) -> float:
        value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
            raise TypeError
        value = float(value)
        if math.isfinite(value) and abs(value) > LARGEST:
            msg = f"beyond {LARGEST:g}"
            raise ValueError(msg)
        if not (math.isfinite(value) and value <= most and (value > least if above else value >= least)):
            raise ValueError
        return value

    words = "a positive, finite number" if above and least == 0 else "a finite number"
    if least > -math.inf and words == "a finite number":
        words += f" {'>' if above else '>='} {least:g}"
    return Rule((words + (f" and <= {most:g}" if most < math.inf else ""),), read)


def one_of(*names: str | None) -> Rule:
    """One of a few names; None is accepted if it is among them."""

    def read(value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            raise TypeError
        if value not in names:
            raise ValueError
        return value if value is None else str(value)

    return Rule(tuple(map(repr, names)), read)


def pair(rule: Rule, words: str) -> Rule:
    """Two values, each of which obeys `rule`, as a tuple; `words` says what they are."""

    def read(value: Any) -> tuple:
        if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
            raise TypeError
        out = tuple(rule.read(each) for each in value)
        if len(out) != 2:
            raise ValueError
        return out

    return Rule((f"{words}, each {rule.expected}",), read, rule.advice)


def several(rule: Rule, least: int = 1) -> Rule:
    """One value, or a list of at least `least` values, each of which obeys `rule`. The result is a tuple."""

    def read(value: Any) -> tuple:
        if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
            return (rule.read(value),)
        out = tuple(rule.read(each) for each in value)
        if len(out) < least:
            raise ValueError
        return out

    return Rule((*rule.options, f"a list of {least} or more of these"), read, rule.advice)


def instance(kind: type, words: str) -> Rule:
    """An instance of a class."""

    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return Rule((words,), read)


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value:
        raise ValueError
    return str(value)


def _path(value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or isinstance(value, str) and not value:
        raise TypeError
    if "\0" in os.fspath(value):
        raise ValueError
    return Path(value)


def _names(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (bytes, dict)) or not isinstance(value, Iterable):
        raise TypeError
    out = tuple(dict.fromkeys(map(_text, value)))
    if not out:
        raise ValueError
    return out


ANYTHING = Rule(("anything",), lambda value: value)  # the function checks this argument itself
NONE, AUTO = one_of(None), one_of("auto")
FLAG, TEXT = Rule(("True", "False"), _flag), Rule(("a name of one or more characters",), _text)
# one name stays a string, a list becomes a tuple without repeats
NAMES = Rule(("a name", "a list of one or more names"), _names)
PATH = Rule(("the path of a file",), _path)
SIZE, SEED = whole(1), whole(0, 2**63 - 1)
POSITIVE, SHARE = number(0, above=True), number(0, 0.9, above=True)
MEMBERS = whole(1, 1000)  # number of fits that are averaged
LAM = (AUTO | number(0)).advised("a prior strength in nats")


def checked(**rules: Rule) -> Callable:
    """Decorate a function so that its rules check the arguments of every call.

    Examples
    --------
    >>> @checked(n=whole(1))
    ... def twice(n):
    ...     return 2 * n
    >>> twice(np.int8(100))
    200
    >>> twice(0)
    Traceback (most recent call last):
        ...
    ValueError: `n=0`: expected a whole number >= 1
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                msg = f"{function.__name__}() {error}: it takes `{'`, `'.join(signature.parameters)}`"
                raise TypeError(msg) from None
            for name, value in bound.arguments.items():
                if name in rules:
                    bound.arguments[name] = rules[name](name, value)
            return function(*bound.args, **bound.kwargs)

        call.rules = rules
        return call

    return decorate


def check_fields(config: Any, **rules: Rule) -> None:
    """Check the fields of a frozen dataclass in its ``__post_init__``, and store them in their plain types.

    Fields without a rule whose default is a float must be positive; those whose default is a whole number must be at least one.
    """
    plain = {f.name: {float: POSITIVE, int: SIZE}.get(type(f.default)) for f in dataclasses.fields(config)}
    for name, rule in (plain | rules).items():
        if rule is not None:
            object.__setattr__(config, name, rule(f"{type(config).__name__}.{name}", getattr(config, name)))


def plain_array(name: str, value: Any, *, advice: str = "pass an array") -> np.ndarray:
    """Convert an array-like value to a NumPy array of its own type. A tensor may be on any device; masked entries are an error.

    Raises
    ------
    TypeError, ValueError
        If the value is not an array (for example a single number or a ragged list), or has masked entries.
    """
    if isinstance(value, np.ma.MaskedArray):
        if value.dtype.names is None and np.ma.is_masked(value):
            msg = f"`{name}` is a masked array with {np.ma.count_masked(value)} masked entries: fill or drop them first"
            raise ValueError(msg)
        value = value.data
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu()
    if not (hasattr(value, "__array__") or isinstance(value, Iterable)) or isinstance(value, (str, bytes, dict, set)):
        msg = f"`{name}={shown(value)}`: expected an array; {advice}"
        raise TypeError(msg)
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"`{name}` cannot be read as an array ({error}): {advice}"
        raise ValueError(msg) from None


def real_array(name: str, value: Any, *, advice: str = "convert it first") -> np.ndarray:
    """Convert an array-like value of real numbers to a contiguous float64 array. NaN and infinity are allowed.

    Raises
    ------
    TypeError, ValueError
        If the value is not an array of real numbers (for example text, dates, booleans, complex numbers, a ragged list), has masked
        entries, or has numbers beyond 1e100, whose squares could overflow.
    """
    array = plain_array(name, value, advice=advice)
    try:
        if array.dtype.kind in "bcmMSUV":
            msg = f"it holds {array.dtype}"
            raise TypeError(msg)
        if array.dtype == object and any(isinstance(v, (bool, np.bool_, complex, str, bytes)) for v in array.ravel()):
            msg = "it holds booleans, texts or complex numbers"
            raise TypeError(msg)
        out = np.ascontiguousarray(array, dtype=np.float64)
        if any(stride < 0 for stride in out.strides) or not out.flags.writeable:  # torch accepts neither
            out = out.copy()
    except (TypeError, ValueError, OverflowError) as error:
        msg = f"`{name}` cannot be read as real numbers ({error}): {advice}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(msg) from None
    largest = np.abs(out, where=np.isfinite(out), out=np.zeros_like(out)).max(initial=0)
    if largest > LARGEST:
        msg = f"`{name}` holds numbers up to {largest:.3g}: expected less than {LARGEST:g}; look for overflow or a fill value"
        raise ValueError(msg)
    return out


def coordinates(name: str, value: Any, n_dims: tuple[int, ...] = (2, 3), *, least: int = 0) -> np.ndarray:
    """Finite coordinates (N, d), float64, with d one of `n_dims` and N >= `least`."""
    array = real_array(name, value, advice="pass coordinates, one row for each point")
    if array.ndim != 2 or array.shape[1] not in n_dims or len(array) < least:
        shapes = " or ".join(f"(N, {d})" for d in n_dims) + (f" with N >= {least}" if least else "")
        msg = f"`{name}` has shape {array.shape}: expected {shapes}, one row for each point"
        raise ValueError(msg)
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        msg = f"`{name}` is not finite at {len(bad)} of {len(array)} points (first: row {bad[0]}, {array[bad[0]].tolist()}): drop them"
        raise ValueError(msg)
    return array
