"""Fields: functions of position in users' units, with exact derivatives, that can be stored in a file."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from neurst.core import jet, storage, table
from neurst.core.arguments import PATH, checked, coordinates, shown
from neurst.core.heads import Affine, Head, Identity, Loadings
from neurst.core.jet import Jet
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian, Likelihood, NegativeBinomial, Poisson, RootGaussian, Truncated
from neurst.core.nets import NETWORKS, Network
from neurst.core.samples import Box
from neurst.core.table import MultiIndex
from neurst.core.tensor_product import value_at

POINTS_AT_ONCE = 16_384  # most points in one forward pass
NUMBERS_AT_ONCE = 2**25  # most numbers in the result of one forward pass
MAX_DIMS = 16  # most coordinates of a stored field
FIELDS: dict[str, type[Field]] = {}  # kind of a stored field -> its class
F = TypeVar("F", bound="Field")


class Field(ABC):
    """A function of position with exact derivatives, in users' units.

    All fields of the package share this protocol. Coordinates are (N, d) array-likes in the units that the field was fitted in. NumPy
    arrays and lists give float64 NumPy arrays, torch tensors give torch tensors. A subclass defines :meth:`in_box`; the derivatives
    are computed from it with jets.
    """

    box: Box
    kind: ClassVar[str]  # name of the class in FIELDS

    @abstractmethod
    def in_box(self, x: Tensor | Jet) -> Tensor | Jet:
        """Values (N, C) at box coordinates (N, d): tensor in, tensor out; jet in, jet out."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The whole field as nested dictionaries of NumPy arrays, numbers and texts."""

    @classmethod
    @abstractmethod
    def from_dict(cls: type[F], stored: Mapping[str, Any]) -> F:
        """The inverse of :meth:`to_dict`. Raises KeyError, TypeError or ValueError if the content is invalid."""

    @property
    def n_dims(self) -> int:
        """d, the number of coordinates."""
        return len(self.box.center)

    @property
    @abstractmethod
    def n_channels(self) -> int:
        """C, the number of values at a point."""

    def __call__(self, coords):  # (N, d) -> (N, C)
        """Values at coordinates."""
        return self.read(self.in_box, coords)

    def jacobian(self, coords):  # (N, d) -> (N, C, d)
        """First derivatives of the values, per unit of the coordinates."""
        width = self.n_channels * self.n_dims
        return self.read(lambda x: jet.jacobian(self.in_box, x) / self.box.scale, coords, width=width)

    def hessian(self, coords):  # (N, d) -> (N, C, d, d)
        """Second derivatives of the values, per square unit of the coordinates."""
        width = self.n_channels * self.n_dims**2
        return self.read(lambda x: jet.hessian(self.in_box, x) / self.box.scale**2, coords, width=width)

    def partials(self, coords, order: int) -> tuple[Any, list[MultiIndex]]:  # (N, d) -> (N, C, M), M multi-indices
        """All distinct partial derivatives of the values up to an order, as :func:`neurst.core.table.partials` gives them."""
        alphas = table.multi_indices(self.n_dims, table.ORDER("order", order))
        unit = torch.tensor([self.box.scale ** -sum(alpha) for alpha in alphas], dtype=torch.float64)

        def function(x: Tensor) -> Tensor:
            found = table.partials(self.in_box, x, order)[0]
            return found * unit.to(found)

        return self.read(function, coords, width=self.n_channels * len(alphas)), alphas

    def read(self, function: Callable[[Tensor], Tensor], coords, *, width: int | None = None):
        """Evaluate `function`, which takes box coordinates (M, d), in chunks of points. It gives `width` numbers for each point, C if None."""
        x = coords if isinstance(coords, Tensor) else torch.from_numpy(coordinates("coords", coords, (self.n_dims,)))
        if x.ndim != 2 or x.shape[1] != self.n_dims:
            msg = f"`coords` has shape {tuple(x.shape)}: expected (N, {self.n_dims}), one row for each point"
            raise ValueError(msg)
        chunk = max(1, min(POINTS_AT_ONCE, NUMBERS_AT_ONCE // max(1, self.n_channels if width is None else width)))
        out, start = None, 0
        with torch.no_grad():
            for part in x.detach().cpu().double().split(chunk):
                values = function(self.box.to_unit(part))
                if out is None:
                    out = values.new_empty(len(x), *values.shape[1:])
                out[start : start + len(part)] = values
                start += len(part)
        return out if isinstance(coords, Tensor) else out.double().numpy()

    def save(self, path: str | os.PathLike) -> None:
        """Write the field to one file, from which :func:`load_field` restores the same numbers. See :func:`neurst.core.storage.save`."""
        storage.save(path, self.kind, self.to_dict())


def stored_as(kind: str) -> Callable[[type[F]], type[F]]:
    """Register the decorated field class under the name `kind`, which is written to its files."""

    def register(cls: type[F]) -> type[F]:
        cls.kind = kind
        FIELDS[kind] = cls
        return cls

    return register


@checked(path=PATH)
def load_field(path: str | os.PathLike) -> Field:
    """A field that its method ``save`` wrote to a file.

    Parameters
    ----------
    path
        Path of the file.

    Returns
    -------
    Field
        The field, of the class that was saved.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        If there is no such file, or if it is damaged, holds something else, or was written by a newer version.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import neurst
    >>> ramp = np.linspace(0, 1, 16)[:, None] * np.ones((1, 12))
    >>> options = neurst.imaging.FitOptions(lam=1.0, steps=20, progress=False)
    >>> field = neurst.imaging.fit_image(ramp, sigma=0.0, options=options)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     field.save(folder + "/ramp.safetensors")
    ...     again = neurst.imaging.load_field(folder + "/ramp.safetensors")
    >>> bool((again([[3.5, 2.0]]) == field([[3.5, 2.0]])).all())
    True
    """
    kind, content = storage.load(path)
    if kind not in FIELDS:
        msg = f"`path={str(path)!r}` holds a {kind!r}, which is not a field: expected one of {sorted(FIELDS)}"
        raise ValueError(msg)
    try:
        return FIELDS[kind].from_dict(content)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = f"`path={str(path)!r}` is damaged ({reason}): save the field again"
        raise ValueError(msg) from error


@stored_as("fitted")
@dataclass(frozen=True, eq=False)
class FittedField(Field):
    """The result of :func:`neurst.core.fit.fit_field`: a network, a head and an inverse link.

    Parameters
    ----------
    box
        The map between users' units and box units.
    network
        Specification of the network.
    net
        The fitted network. It maps box coordinates (N, d) to r latent channels, followed by those of an auxiliary field if the
        penalty has one.
    head
        Maps the latent channels to the predictor.
    likelihood
        The data term of the fit, which provides the inverse link.
    n_latent
        r, the number of latent channels: the leading outputs of the network.
    lam
        Prior strength in nats (natural-log units of likelihood).
    history
        ``step``, ``objective``, ``likelihood``, ``penalty``. Each entry is a mean over the steps since the previous entry. The
        objective is in nats if the likelihood is.
    """

    box: Box
    network: Network
    net: nn.Module
    head: Head
    likelihood: Likelihood
    n_latent: int
    lam: float
    history: dict[str, list[float]]

    @property
    def n_channels(self) -> int:
        """C, the number of channels."""
        return self.head.n_channels(self.n_latent)

    def _latent_in_box(self, x: Tensor | Jet) -> Tensor | Jet:
        return self.net(x.to(next(self.net.parameters())))[..., : self.n_latent]

    def in_box(self, x: Tensor | Jet) -> Tensor | Jet:
        return self.likelihood.mean(self.head(self._latent_in_box(x)))

    def latent(self, coords):  # (N, d) -> (N, r)
        """The latent channels at coordinates."""
        return self.read(self._latent_in_box, coords, width=self.n_latent)

    def on_lattice(self, lattice: Lattice) -> Tensor:  # -> (N, C)
        """Values at the nodes of a lattice in users' units, in row-major order."""
        with torch.no_grad():
            x = self.box.to_unit_like(lattice, next(self.net.parameters()))
            return self.likelihood.mean(self.head(value_at(self.net, x)[:, : self.n_latent]))

    def with_head(self, head: Head) -> FittedField:
        """The same network with another head."""
        return dataclasses.replace(self, head=head.eval())

    def to_dict(self) -> dict[str, Any]:
        with torch.no_grad():
            n_outputs = self.net(torch.zeros(1, self.n_dims).to(next(self.net.parameters()))).shape[1]
        return {
            "network": NETWORKS.to_dict(self.network),
            "n_outputs": n_outputs,
            "n_latent": self.n_latent,
            "lam": self.lam,
            "box_center": self.box.center.numpy(),
            "box_scale": self.box.scale,
            "head": _module_to_dict(self.head),
            "likelihood": _module_to_dict(self.likelihood),
            "weights": {name.replace(".", "-"): w.numpy() for name, w in self.net.state_dict().items()},
            "history": {name: np.asarray(values) for name, values in self.history.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> FittedField:
        box = box_from_dict(stored)
        network, n_latent = NETWORKS.from_dict(stored["network"]), int(stored["n_latent"])
        net = network_from_dict(network, len(box.center), int(stored["n_outputs"]), stored["weights"])
        if not 1 <= n_latent <= int(stored["n_outputs"]):
            msg = f"n_latent is {n_latent}, expected 1 to {stored['n_outputs']}"
            raise ValueError(msg)
        head, likelihood = (_module_from_dict(stored[name]) for name in ("head", "likelihood"))
        history = {name: np.asarray(values).tolist() for name, values in stored["history"].items()}
        field = cls(box, network, net, head, likelihood, n_latent, float(stored["lam"]), history)
        found = field.in_box(torch.zeros(1, field.n_dims))  # an error if the parts do not fit together
        if found.shape != (1, field.n_channels) or not found.isfinite().all():
            msg = f"a value of the field is {found.tolist()}, expected {field.n_channels} finite numbers"
            raise ValueError(msg)
        if len({len(column) for column in history.values()}) > 1:
            msg = "the columns of history differ in length"
            raise ValueError(msg)
        return field


MODULES = (Affine, Gaussian, Identity, Loadings, NegativeBinomial, Poisson, RootGaussian, Truncated)


def _module_to_dict(module: Head | Likelihood) -> dict[str, Any]:
    """The class name of a head or a likelihood, and its constructor arguments."""
    if type(module) not in MODULES:
        msg = f"{type(module).__name__} cannot be stored: expected one of {[cls.__name__ for cls in MODULES]}"
        raise TypeError(msg)
    return {"class": type(module).__name__, **{k: v.detach().cpu().numpy() for k, v in module.arguments().items()}}


def _module_from_dict(stored: Mapping[str, Any]) -> Head | Likelihood:
    cls = {cls.__name__: cls for cls in MODULES}[str(stored["class"])]
    arguments = {k: torch.from_numpy(finite_array(stored, k)) for k in stored if k != "class"}
    return cls(**arguments).requires_grad_(False).eval()


def box_from_dict(stored: Mapping[str, Any]) -> Box:
    """The box of a stored field, from its ``box_center`` and ``box_scale``."""
    if not 1 <= np.size(stored["box_center"]) <= MAX_DIMS:
        msg = f"box_center has {np.size(stored['box_center'])} entries, expected 1 to {MAX_DIMS}"
        raise ValueError(msg)
    center = finite_array(stored, "box_center", np.size(stored["box_center"]), dtype=np.float64)
    return Box(torch.from_numpy(center), positive_number(stored, "box_scale"))


def network_from_dict(network: Network, n_in: int, n_out: int, weights: Mapping[str, Any]) -> nn.Module:
    """The network with stored weights, in their type. It is built only if the number of stored weights is right."""
    dotted = {name.replace("-", "."): values for name, values in weights.items()}
    arrays = {name: finite_array(dotted, name, whole=True) for name in dotted}
    stored, needed = sum(array.size for array in arrays.values()), network.n_weights(n_in, n_out)
    if stored != needed:
        msg = f"{stored:,} weights are stored, but {network} with {n_in} inputs and {n_out} outputs has {needed:,}"
        raise ValueError(msg)
    net = network.build(n_in, n_out, torch.Generator().manual_seed(0))
    net.to(torch.float64 if any(array.dtype == np.float64 for array in arrays.values()) else torch.float32)
    try:
        net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return net.requires_grad_(False).eval()


def check_round_trip(network: Network, n_in: int, n_out: int = 1) -> None:
    """Raise an error unless a network can be stored: its numbers are all in its ``state_dict()``, and as many as it says.

    It is built twice, from two seeds. The second one, with the stored weights of the first, must give the same values.
    """
    x = torch.linspace(-0.9, 0.8, 5 * n_in).reshape(5, n_in)
    net = network.build(n_in, n_out, torch.Generator().manual_seed(1)).eval()
    weights = {name.replace(".", "-"): w.detach().numpy() for name, w in net.state_dict().items()}
    try:
        with torch.no_grad():
            same = torch.allclose(network_from_dict(network, n_in, n_out, weights)(x), net(x))
    except (KeyError, TypeError, ValueError) as error:
        msg = f"`network={shown(network)}` cannot be stored ({error}): see `Network.build` and `Network.n_weights`"
        raise ValueError(msg) from error
    if not same:
        msg = (
            f"`network={shown(network)}` cannot be stored: with its stored weights it gives other values. Keep everything that is drawn at random "
            "in parameters or persistent buffers"
        )
        raise ValueError(msg)


def finite_array(
    stored: Mapping[str, Any],
    name: str,
    *shape: int,
    minus_infinity: bool = False,
    whole: bool = False,
    dtype: type | None = None,
) -> np.ndarray:
    """A stored array as floating-point numbers, checked to be finite and of the given shape, if any.

    `minus_infinity` allows minus infinity. With `whole`, an array of integers keeps its type.
    """
    value = np.asarray(stored[name], dtype=dtype)
    if value.dtype not in (np.float32, np.float64) and not (whole and value.dtype.kind in "iu"):
        value = value.astype(np.float64)
    if shape and value.shape != shape:
        msg = f"{name} has shape {value.shape}, expected {shape}"
        raise ValueError(msg)
    if not np.all(np.isfinite(value) | (minus_infinity & np.isneginf(value))):
        msg = f"{name} is not finite"
        raise ValueError(msg)
    return np.asarray(value, order="C")


def positive_number(stored: Mapping[str, Any], name: str) -> float:
    """A stored number that is positive and finite."""
    value = float(stored[name])
    if not 0 < value < np.inf:
        msg = f"{name} is {value}, expected a positive number"
        raise ValueError(msg)
    return value
