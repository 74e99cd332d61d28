"""The network of a local neural field."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.imaging.lofi.reading import grid_patches, pyramid, reach_of_level, read_patches
from neurst.imaging.lofi.spec import LoFiSpec

PIECES = 32  # of the radial filter
HIGHEST = math.sqrt(0.5) + 1e-4  # frequency in cycles per pixel, at the corner of the spectrum
CONTRAST = 0.6  # of a patch in units of the noise, inside the inverse hyperbolic sine
FREE_SHARE = 0.1  # of the part of the weights that is not positive
CHUNK = 512  # points that are computed together
LARGEST_MOVE = 3.0  # pixels that a refinement moves a point at most


class Dense(nn.Module):
    """Several networks of the same size side by side, each with its own input: (K, n_in, N) -> (K, n_out, N)."""

    def __init__(self, count: int, sizes: list[int]):
        super().__init__()
        pairs = list(zip(sizes, sizes[1:], strict=False))
        draw = lambda n_in, *shape: nn.Parameter((2 * torch.rand(shape) - 1) / math.sqrt(n_in))
        self.weights = nn.ParameterList(draw(a, count, b, a) for a, b in pairs)
        self.biases = nn.ParameterList(draw(a, count, b, 1) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, weight, x if k == 0 else F.gelu(x))
        return x


class PatchNet(nn.Module):
    """Patches (M, R, N) to outputs (n_out, N)."""

    def __init__(self, spec: LoFiSpec, rings: int, n_out: int):
        super().__init__()
        mixer = [spec.mixer_width] * spec.mixer_depth
        if spec.patch_net == "multi":
            self.rays = Dense(spec.rays, [rings, *[spec.width] * spec.depth, spec.features])
            self.mixer = Dense(1, [spec.rays * spec.features, *mixer, n_out])
        else:
            self.rays, self.mixer = None, Dense(1, [spec.rays * rings, *mixer, n_out])

    def forward(self, patches: Tensor) -> Tensor:
        features = patches if self.rays is None else F.gelu(self.rays(patches))
        return self.mixer(features.flatten(0, 1)[None])[0]


class Filter(nn.Module):
    r"""A linear filter of whole pictures with the transfer function H, which is 1 at frequency 0.

    ``"radial"``: H is real and linear between :math:`33` frequencies :math:`|k|` up to that of the corner of the spectrum. ``"free"``: one complex number for each frequency of a shape.
    """

    def __init__(self, kind: str, shape: tuple[int, int] | None):
        super().__init__()
        self.shape = shape if kind == "free" else None
        size = (PIECES + 1,) if kind == "radial" else (shape[0], shape[1] // 2 + 1, 2)
        start = torch.zeros(size)
        start[..., 0 if kind == "free" else slice(None)] = 1
        self.transfer = nn.Parameter(start)

    def response(self, height: int, width: int) -> Tensor:  # (height, width // 2 + 1)
        """H at the frequencies of a picture."""
        rows = torch.fft.fftfreq(height, device=self.transfer.device)[:, None]
        radius = torch.hypot(rows, torch.fft.rfftfreq(width, device=self.transfer.device))
        if self.shape is not None:
            return torch.where(radius > 0, torch.view_as_complex(self.transfer), 1)
        at = radius / HIGHEST * PIECES
        low = at.long().clamp_max(PIECES - 1)
        h = torch.cat([torch.ones_like(self.transfer[:1]), self.transfer[1:]])
        return torch.lerp(h[low], h[low + 1], at - low)

    def forward(self, pictures: Tensor) -> Tensor:  # (B, C, H, W)
        height, width = pictures.shape[-2:]
        return torch.fft.irfft2(torch.fft.rfft2(pictures) * self.response(height, width), s=(height, width))


class LoFiNet(nn.Module):
    r"""Values of pictures at coordinates, from the values around them.

    Pictures are in units of their noise, or of their spread if the noise is not known. The network reads each patch after its mean is taken off; in units of the noise, an inverse hyperbolic sine then tames large contrasts.

    Parameters
    ----------
    spec
        Numbers of the model.
    in_noise_units
        Whether pictures are divided by their noise level.
    shape
        (H, W) of all pictures, for ``filter="free"``.
    """

    def __init__(self, spec: LoFiSpec, *, in_noise_units: bool = True, shape: tuple[int, int] | None = None):
        super().__init__()
        self.spec, self.in_noise_units = spec, in_noise_units
        angles = 2 * math.pi * torch.arange(spec.rays) / spec.rays
        turned = angles + math.pi / spec.rays * (torch.arange(len(spec.radii)) % 2)[:, None]
        circles = torch.tensor(spec.radii)[:, None, None] * torch.stack([turned.sin(), turned.cos()], -1)
        self.positions = nn.Parameter(circles)  # (R, M, 2) in pixels
        self.log_scale = nn.Parameter(torch.zeros(()))
        read_rings = len(spec.radii) * spec.copies * spec.channels
        n_out = spec.channels * (2 * spec.samples if spec.head == "weights" else 1)
        self.filter = None if spec.filter == "none" else Filter(spec.filter, shape)
        self.net = PatchNet(spec, read_rings, n_out)
        n_moves = 2 * len(spec.radii) * spec.rays
        self.moves = nn.ModuleList(PatchNet(spec, read_rings, n_moves) for _ in range(spec.refinements))
        for each in self.moves:
            nn.init.zeros_(each.mixer.weights[-1])
            nn.init.zeros_(each.mixer.biases[-1])

    def offsets(self) -> Tensor:  # (R, M, 2)
        """The learned positions of the patch, in pixels."""
        return self.log_scale.exp() * self.positions

    def margin(self) -> int:
        """How far in pixels around a point the picture is read."""
        spec = self.spec
        far = float(self.offsets().detach().abs().max()) + LARGEST_MOVE * spec.refinements
        return math.ceil(far) + 3 + reach_of_level(max(spec.levels))

    def with_filter(self, pictures: Tensor) -> Tensor:
        """Whole pictures (B, C, H, W), and filtered copies as further channels if the model has a filter."""
        return pictures if self.filter is None else torch.cat([pictures, self.filter(pictures)], 1)

    def forward(self, pictures: Tensor, points: Tensor) -> Tensor:  # -> (B, P, C)
        """Values at points (B, P, 2) of what :meth:`with_filter` gives."""
        patches, _ = self.patches(pyramid(pictures, self.spec.levels), points)
        return self.values(patches).T.unflatten(0, points.shape[:2])

    def at_points(self, picture: Tensor, points: Tensor) -> Tensor:  # (C, h, w), (P, 2) -> (P, C)
        """Values of one picture at any number of points."""
        copies = pyramid(picture[None], self.spec.levels)
        parts = [self.values(self.patches(copies, part[None])[0]) for part in points.split(CHUNK)]
        return torch.cat(parts, 1).T

    def patches(self, copies: dict[int, Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (channels, M, R, B P) of the copies of pictures (B, channels, H, W) after all refinements, and their positions relative to the points, which broadcast to (B, P, R, M, 2)."""
        offsets = self.offsets()
        patches = read_patches(copies, points, offsets, self.spec.levels)
        for network in self.moves:
            moves = LARGEST_MOVE * torch.tanh(network(self._standardised(patches)[0]))
            offsets = offsets + moves.T.reshape(*points.shape[:2], *self.positions.shape)
            patches = read_patches(copies, points, offsets, self.spec.levels)
        return patches, offsets

    def on_grid(self, pictures: Tensor) -> Tensor:  # (1, C, h + 2m, w + 2m) -> (h, w, C)
        """Values at all pixels but those of the margin m, for a model without refinements."""
        m = self.margin()
        copies = pyramid(pictures, self.spec.levels)
        patches = grid_patches(copies, self.offsets(), self.spec.levels, m)
        shape = [n - 2 * m for n in pictures.shape[-2:]]
        return torch.cat([self.values(part) for part in patches.split(CHUNK, -1)], 1).T.unflatten(0, shape)

    def _standardised(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """What the network reads (M, rings, N), and the means of the patches (C, N)."""
        by_channel = patches.unflatten(0, (self.spec.copies, self.spec.channels))  # filtered copies come second
        mean = by_channel.mean((0, 2, 3))
        if self.spec.head == "value":
            mean = torch.zeros_like(mean)
        inputs = by_channel - mean[:, None, None]
        if self.in_noise_units:  # asinh, which `torch.asinh` computes 20 times slower
            inputs = CONTRAST * inputs
            inputs = (inputs.abs() + (inputs.square() + 1).sqrt()).log().copysign(inputs)
        return inputs.flatten(0, 1).transpose(0, 1).flatten(1, 2), mean

    def values(self, patches: Tensor) -> Tensor:
        """Values (C, N) of patches (copies * C, M, R, N)."""
        spec = self.spec
        inputs, mean = self._standardised(patches)
        out = self.net(inputs)
        if spec.head != "weights":
            return mean + out
        own = patches.unflatten(0, (spec.copies, spec.channels)).transpose(0, 1).flatten(1, 3)  # (C, samples, N)
        share, free = out.unflatten(0, (spec.channels, 2, spec.samples)).unbind(1)
        weights = share.softmax(1) + FREE_SHARE * (free - free.mean(1, keepdim=True))
        # the mean is taken off first, as weights that sum to 1 up to rounding would multiply it
        return mean + (weights * (own - mean[:, None])).sum(1)
