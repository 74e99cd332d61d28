"""Specifications: frozen dataclasses of plain numbers that have a name and can be stored in a file.

Networks and penalties are such specifications. A :class:`Registry` maps names to the specifications of one kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from neurst.core.arguments import Rule, shown


class Registry(dict):
    """Specifications of one kind by name.

    Parameters
    ----------
    kind
        What the specifications are, and the name of arguments that take one: ``"network"``.
    where
        Full name of the registry, for error messages: ``"neurst.core.nets.NETWORKS"``.
    base
        Common base class of the specifications.
    example
        Code of one specification, for error messages.

    Examples
    --------
    >>> from neurst.core.nets import NETWORKS
    >>> NETWORKS.get_spec("siren").width
    128
    >>> NETWORKS.to_dict(NETWORKS.get_spec("spline"))
    {'name': 'spline', 'cells': [4, 8, 16, 32]}
    """

    def __init__(self, kind: str, where: str, base: type, example: str):
        super().__init__()
        self.kind, self.where, self.base, self.example = kind, where, base, example

    def register(self, name: str) -> Callable[[type], type]:
        """Register the decorated class under a name, so that it can be chosen by name, stored, and read back.

        Before a file with such a specification is read, the class must be registered under the same name.
        """

        def add(cls: type) -> type:
            frozen = isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
            if not (frozen and issubclass(cls, self.base)):
                msg = f"{cls!r} cannot be registered: expected a frozen dataclass derived from {self.base.__name__}"
                raise TypeError(msg)
            if not (isinstance(name, str) and name.replace("-", "_").isidentifier()):
                msg = f"the {self.kind} name {shown(name)} cannot be stored: expected letters, digits, '_' or '-'"
                raise ValueError(msg)
            if "name" in {f.name for f in dataclasses.fields(cls)}:
                msg = f"{cls!r} cannot be registered: its field 'name' would be mixed up with its registered name; call it otherwise"
                raise TypeError(msg)
            if self.get(name, cls) is not cls:
                msg = f"the {self.kind} name {name!r} is taken by {self[name]!r}: choose another one"
                raise ValueError(msg)
            self[name] = cls
            return cls

        return add

    def get_spec(self, value: Any) -> Any:
        """The specification behind a name, or the specification itself.

        Raises
        ------
        TypeError, ValueError
            If `value` is not a specification of this kind or a registered name.
        """
        value = named(self)(self.kind, value)
        return self[value]() if isinstance(value, str) else value

    def name_of(self, spec: Any) -> str | None:
        """The name under which the class of a specification is registered; None if it is not registered."""
        return next((name for name, cls in self.items() if cls is type(spec)), None)

    def to_dict(self, spec: Any) -> dict[str, Any]:
        """The name and numbers of a specification as plain values. Its inverse is :meth:`from_dict`.

        Raises
        ------
        TypeError
            If it cannot be stored: its class is not registered, or a field is not a number, a text, or a tuple of them.
        """
        name = self.name_of(spec)
        if name is None:
            msg = (
                f"`{self.kind}={shown(spec)}` cannot be stored, as {type(spec).__name__} has no name: decorate the class with "
                f'`@{self.where}.register("a_name")`; a subclass needs a name of its own'
            )
            raise TypeError(msg)
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
        for field, value in fields.items():
            parts = value if isinstance(value, tuple) else (value,)
            if not all(type(part) in (bool, int, float, str) for part in parts) or len(set(map(type, parts))) > 1:
                msg = (
                    f"`{self.kind}={shown(spec)}` cannot be stored: its {field!r} is {shown(value)}, expected a number, a text, or a "
                    "tuple of one type of them"
                )
                raise TypeError(msg)
        default = {f.name: f.default for f in dataclasses.fields(spec)}
        plain = {
            field: list(value) if isinstance(value, tuple) else value
            for field, value in fields.items()
            if not (value == () and default[field] == ())
        }
        return {"name": name} | plain

    def from_dict(self, stored: Mapping[str, Any]) -> Any:
        """The specification that :meth:`to_dict` turned into a dictionary.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the name is not registered or the numbers are invalid.
        """
        name = str(stored["name"])
        if name not in self:
            msg = f"the {self.kind} {name!r} is unknown here: register its class under this name first"
            raise ValueError(msg)
        cls = self[name]
        return cls(**{field: _plain(value) for field, value in stored.items() if field != "name"})


def _plain(value: Any) -> Any:
    """A value read from a file, in a type of Python itself: arrays become tuples, NumPy numbers Python numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list) else value


def named(registry: Registry) -> Rule:
    """A rule that accepts a name of a registry, or a specification of its kind."""

    def read(value: Any) -> Any:
        if isinstance(value, registry.base):
            return value
        if not isinstance(value, str):
            raise TypeError
        if value not in registry:
            raise ValueError
        return str(value)

    return Rule((*map(repr, sorted(registry)), f"a specification such as `{registry.example}`"), read)
