r"""Local neural fields: the value at any coordinate from the observed values around it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neurst.core import storage
from neurst.core.arguments import NONE, PATH, SIZE, checked, coordinates, pair
from neurst.imaging.arrays import SIGMA, noise_level
from neurst.imaging.lofi.net import LoFiNet
from neurst.imaging.lofi.pictures import Picture, tensor
from neurst.imaging.lofi.reading import pyramid, window
from neurst.imaging.lofi.spec import LoFiSpec
from neurst.imaging.lofi.warp import Warp

KIND = "lofi"  # of a saved file
FORMAT = 1  # of its content; raise it when the layout changes
TILE = 128  # side in pixels of the parts in which a picture is computed
NOISE_SIDE = 1024  # of the part from which a noise level is estimated
FARTHEST = 1e9  # coordinates in pixels
SHAPE = NONE | pair(SIZE, "(height, width)")


@dataclass(frozen=True, eq=False)
class Standard:
    """A picture in the units of the network: shifted, divided, and with a filtered copy if the model has a filter."""

    picture: Picture
    shift: NDArray  # (C,)
    scale: float
    filtered: NDArray | None  # (H, W, C), in the units of the network

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:  # (channels, height, width)
        """A part of it, mirrored beyond the border."""
        part = tensor((self.picture.part(top, left, height, width).astype(np.float64) - self.shift) / self.scale)
        if self.filtered is None:
            return part
        return torch.cat([part, tensor(window(self.filtered, top, left, height, width))])


class LoFi:
    """A trained local neural field, which :func:`fit_lofi` gives.

    Called with a picture it gives the restored picture; :meth:`at` gives values at any coordinates.

    Parameters
    ----------
    net
        The network.
    unit
        Standard deviation of the training pictures, by which pictures are divided where the noise level is not known. None for a model that reads the noise level.
    warp
        Where the input is read for each coordinate of the result; None reads it at the same coordinate.
    """

    def __init__(self, net: LoFiNet, *, unit: float | None = None, warp: Warp | None = None):
        self.net, self.unit, self.warp = net.eval().requires_grad_(False), unit, warp
        if warp is not None:
            warp.double().eval().requires_grad_(False)

    @property
    def spec(self) -> LoFiSpec:
        """Numbers of the model."""
        return self.net.spec

    @torch.no_grad()
    def __call__(
        self, image: ArrayLike, *, sigma: float | None = None, shape: tuple[int, int] | None = None
    ) -> NDArray:
        """The restored picture.

        Parameters
        ----------
        image
            (H, W), or (H, W, C) for any C if the model has one channel. Unsigned integers are scaled to [0, 1].
        sigma
            Standard deviation of the noise in the units of the picture (of the range from 0 to 1, for unsigned integers). None estimates it, for each channel if the model has one, from the middle 1,024 x 1,024 pixels. Only for models
            that were trained for noise levels.
        shape
            (H', W') of the result over the same area, whose pixel i is at ``(i + 1/2) H / H' - 1/2``; None is the shape of `image`.

        Returns
        -------
        numpy.ndarray
            (H', W') or (H', W', C).

        Raises
        ------
        TypeError, ValueError
            For a picture of a wrong type or shape or that is not finite, and a noise level that is 0 or does not belong to the model.
        """
        picture, shape = Picture.of("image", image), SHAPE("shape", shape)
        new = picture.shape if shape is None else shape
        dtype = np.result_type(np.asarray(image).dtype, np.float32)
        on_pixels = new == picture.shape and self.warp is None and not self.spec.refinements
        planes = []
        for standard in self._planes(picture, sigma):
            if on_pixels:
                plane = self._on_pixels(standard)
            else:
                sides = zip(picture.shape, new, strict=True)
                axes = (
                    [(torch.arange(n) + 0.5) * m / n - 0.5 for m, n in sides]
                    if self.warp is None
                    else map(torch.arange, new)
                )
                points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2).double()
                plane = self._at(standard, self._warped(points, new, picture.shape)).reshape(*new, -1)
            planes.append(standard.shift + standard.scale * plane)
        out = np.concatenate(planes, -1).astype(dtype)
        return out[..., 0] if np.ndim(image) == 2 else out

    @torch.no_grad()
    def at(
        self, image: ArrayLike, coords: ArrayLike, *, sigma: float | None = None, shape: tuple[int, int] | None = None
    ) -> NDArray:  # -> (N, C)
        """Values at any coordinates.

        Parameters
        ----------
        image, sigma
            As in a call.
        coords
            (N, 2) (row, column) in pixels, with the first pixel centre at (0, 0). Beyond the border the picture is mirrored.
        shape
            (H, W) of the picture that the coordinates belong to, for a model with a warp; None is that of `image`.
        """
        picture, shape = Picture.of("image", image), SHAPE("shape", shape)
        points = _points(coords)
        points = self._warped(points, shape or picture.shape, picture.shape)
        planes = [
            standard.shift + standard.scale * self._at(standard, points) for standard in self._planes(picture, sigma)
        ]
        return np.concatenate(planes, -1)

    @torch.no_grad()
    def geometry(self, image: ArrayLike, coords: ArrayLike, *, sigma: float | None = None) -> NDArray:
        """Where the picture is read for each coordinate: (N, R, M, 2) in pixels, R rings of M points.

        Without refinements all coordinates have the same positions relative to them. Of a picture with several channels, a model with one channel looks at the first.

        Parameters
        ----------
        image, coords, sigma
            As in :meth:`at`.
        """
        picture = Picture.of("image", image)
        points = _points(coords)
        points = self._warped(points, picture.shape, picture.shape)
        standard = next(self._planes(picture, sigma))
        out = np.empty((len(points), *self.net.positions.shape))
        for rows, part, local in self._parts(standard, points):
            offsets = self.net.patches(pyramid(part[None], self.spec.levels), local[None])[1]
            out[rows] = (points[rows, None, None] + offsets.reshape(-1, *offsets.shape[-3:])).numpy()
        return out

    def _warped(self, points: Tensor, shape: tuple[int, int], source: tuple[int, int]) -> Tensor:
        return points if self.warp is None else self.warp(points, shape, source)

    def _planes(self, picture: Picture, sigma: float | None) -> Iterator[Standard]:
        """The picture in the units of the network, its channels one by one for a model of one channel."""
        channels, sigma = self.spec.channels, SIGMA("sigma", sigma)
        if channels not in (1, picture.channels):
            msg = f"`image` has {picture.channels} channels: expected {channels}, as in training"
            raise ValueError(msg)
        single = [Picture(picture.values[..., c : c + 1], picture.scale) for c in range(picture.channels)]
        for part in single if channels == 1 else [picture]:
            scale = self._scale(part, sigma)
            shift = np.zeros(channels) if self.spec.head == "value" else part.moments()[0]
            yield Standard(part, shift, scale, self._filtered(part, shift, scale))

    def _scale(self, picture: Picture, sigma: float | None) -> float:
        if not self.net.in_noise_units:
            if sigma is not None:
                msg = f"`sigma={sigma:g}`: expected None, as this model was trained on inputs of its own and reads no noise level"
                raise ValueError(msg)
            return self.unit
        if sigma is None:
            middle = [(max(0, (n - NOISE_SIDE) // 2), min(n, NOISE_SIDE)) for n in picture.shape]
            sigma = noise_level(picture.part(middle[0][0], middle[1][0], middle[0][1], middle[1][1]))
        if not sigma > 0:
            msg = f"`sigma={sigma:g}`: expected the standard deviation of noise that is there; data without noise need no smoothing"
            raise ValueError(msg)
        return sigma

    def _filtered(self, picture: Picture, shift: NDArray, scale: float) -> NDArray | None:
        if self.net.filter is None:
            return None
        if self.net.filter.shape not in (None, picture.shape):
            msg = f"`image` has shape {picture.shape}: expected {self.net.filter.shape}, that of the training pictures, as `filter='free'` belongs to one shape"
            raise ValueError(msg)
        whole = tensor((picture.whole() - shift) / scale)[None]
        return np.moveaxis(self.net.filter(whole)[0].numpy(), 0, -1)

    def _on_pixels(self, standard: Standard) -> NDArray:  # (H, W, C)
        """Values at all pixels, computed in tiles."""
        (height, width), m = standard.picture.shape, self.net.margin()
        out = np.empty((height, width, self.spec.channels), np.float32)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                h, w = min(TILE, height - top), min(TILE, width - left)
                part = standard.part(top - m, left - m, h + 2 * m, w + 2 * m)
                out[top : top + h, left : left + w] = self.net.on_grid(part[None]).numpy()
        return out

    def _at(self, standard: Standard, points: Tensor) -> NDArray:  # (N, 2) -> (N, C)
        """Values at coordinates."""
        out = np.empty((len(points), self.spec.channels), np.float32)
        for rows, part, local in self._parts(standard, points):
            out[rows] = self.net.at_points(part, local).numpy()
        return out

    def _parts(self, standard: Standard, points: Tensor) -> Iterator[tuple[NDArray, Tensor, Tensor]]:
        """For each tile, the rows of the points in it, the part of the picture around it, and the points relative to this part."""
        m, tiles = self.net.margin(), torch.div(points, TILE, rounding_mode="floor")
        order = np.lexsort(tiles.T.numpy())
        changes = np.flatnonzero((np.diff(tiles.numpy()[order], axis=0) != 0).any(1)) + 1
        for rows in np.split(order, changes) if len(points) else []:
            top, left = (int(n) * TILE - m for n in tiles[rows[0]])
            part = standard.part(top, left, TILE + 2 * m + 1, TILE + 2 * m + 1)
            yield rows, part, (points[rows] - torch.tensor([top, left])).float()

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to one file, which :func:`load_lofi` reads."""
        warp = None if self.warp is None else {"kind": self.warp.kind, "weights": storage.weights_of(self.warp)}
        content = {
            "format": FORMAT,
            "spec": dataclasses.asdict(self.spec),
            "unit": self.unit,
            "shape": None if self.net.filter is None else self.net.filter.shape,
            "weights": storage.weights_of(self.net),
        }
        storage.save(PATH("path", path), KIND, content | ({} if warp is None else {"warp": warp}))


def _points(coords: ArrayLike) -> Tensor:  # (N, 2)
    array = coordinates("coords", coords, (2,))
    if np.abs(array).max(initial=0) > FARTHEST:
        msg = (
            f"`coords` go up to {np.abs(array).max():.3g}: expected (row, column) in pixels, at most {FARTHEST:g} away"
        )
        raise ValueError(msg)
    return torch.from_numpy(array)


@checked(path=PATH)
def load_lofi(path: str | os.PathLike) -> LoFi:
    """The model in a file that :meth:`LoFi.save` wrote.

    Parameters
    ----------
    path
        Path of the file.

    Returns
    -------
    LoFi
        The model.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is damaged, it holds something else, or it was written by another version with another layout.

    Examples
    --------
    >>> import tempfile
    >>> from neurst.imaging.lofi import load_lofi, pretrained_lofi
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pretrained_lofi().save(folder + "/a.safetensors")
    ...     load_lofi(folder + "/a.safetensors").spec.rays
    9
    """
    return storage.restore(path, KIND, FORMAT, _built)


def _built(content: dict[str, Any]) -> LoFi:
    """The model of a stored content."""
    unit, shape, warp = content["unit"], content["shape"], None
    if not (unit is None or 0 < unit < math.inf):
        msg = f"the unit is {unit}"
        raise ValueError(msg)
    net = LoFiNet(LoFiSpec(**content["spec"]), in_noise_units=unit is None, shape=shape and tuple(shape))
    storage.fill(net, content["weights"])
    if "warp" in content:
        warp = Warp(content["warp"]["kind"])
        storage.fill(warp, content["warp"]["weights"])
    return LoFi(net, unit=unit, warp=warp)


SHIPPED = Path(__file__).with_name("denoiser.safetensors")  # which benchmarks/train_lofi.py writes


def pretrained_lofi() -> LoFi:
    """The model that ships with the package: for Gaussian noise of 1 to 35 % of the range, trained on twelve grey photographs by benchmarks/train_lofi.py.

    Each call gives a copy.

    Examples
    --------
    >>> pretrained_lofi().spec.channels
    1
    """
    return copy.deepcopy(shipped_lofi())


@functools.cache
def shipped_lofi() -> LoFi:
    """The same model, one for all callers, which is not to be changed."""
    return load_lofi(SHIPPED)
