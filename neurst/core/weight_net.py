"""A network that reads weights of total (generalised) variation off a picture: small at edges, large in flat parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core import storage

LEAK = 0.1  # slope of the leaky rectifier at negative values


class UNet(nn.Module):
    """A small convolutional network from (B, n_in, H, W) to (B, n_out, H, W), for pictures of any size."""

    def __init__(self, n_in: int, n_out: int, width: int, depth: int):
        super().__init__()
        sizes = [width * 2**k for k in range(depth + 1)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([n_in, *sizes], sizes, strict=False))
        pairs = list(zip(sizes[::-1], sizes[-2::-1], strict=False))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.up = nn.ModuleList(_block(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(width, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        shape, multiple = x.shape[-2:], 2 ** len(self.up)
        missing = [-n % multiple for n in shape]
        x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
        kept = []
        for k, block in enumerate(self.down):
            x = block(x if k == 0 else F.avg_pool2d(x, 2))
            kept.append(x)
        for shrink, block, skip in zip(self.shrink, self.up, kept[-2::-1], strict=True):
            x = F.interpolate(shrink(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.head(x)[..., : shape[0], : shape[1]]


def _block(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in (n_in, n_out):
        layers += [nn.Conv2d(n, n_out, 3, padding=1, padding_mode="replicate"), nn.LeakyReLU(LEAK)]
    return nn.Sequential(*layers)


class WeightNet(nn.Module):
    r"""Logarithms of weights at each pixel, :math:`c \tanh(h / c) + b` with h the output of a U-Net.

    The network reads :math:`(x - m) / r` and :math:`\log(\sigma / r)`, where m is the mean of the picture x, r is a scale such as its standard deviation, and
    :math:`\sigma` is the standard deviation of the noise. It may read several pictures of one scene. The logarithms stay the same if the picture is shifted, or scaled with r and its noise. The last layer starts at 0, so an untrained
    network gives b everywhere.

    Parameters
    ----------
    starts
        exp(b) at first: one number for each weight.
    width, depth
        Channels at full resolution, and number of times that the resolution is halved while the channels double.
    log_range
        c.
    n_pictures
        Number of pictures of a scene.

    Examples
    --------
    >>> net = WeightNet([0.8, 1.6], width=4, depth=1, log_range=4.0)
    >>> net(torch.randn(3, 1, 9, 14), torch.ones(3, 1, 1, 1), torch.full((3, 1, 1, 1), 0.1)).shape
    torch.Size([3, 2, 9, 14])
    """

    def __init__(self, starts: Sequence[float], width: int, depth: int, log_range: float, n_pictures: int = 1):
        super().__init__()
        self.log_range = log_range
        self.net = UNet(n_pictures + 1, len(starts), width, depth)
        nn.init.zeros_(self.net.head.weight)
        nn.init.zeros_(self.net.head.bias)
        self.bias = nn.Parameter(torch.tensor(starts).log())

    def forward(self, pictures: Tensor, rms: Tensor, noise: Tensor) -> Tensor:  # -> (B, n_weights, H, W)
        """Log-weights of pictures (B, n_pictures, H, W) with standard deviations and noise levels (B, 1, 1, 1)."""
        centred = (pictures - pictures.mean((2, 3), keepdim=True)) / rms
        h = self.net(torch.cat([centred, (noise / rms).log().expand_as(pictures[:, :1])], 1))
        return self.log_range * torch.tanh(h / self.log_range) + self.bias[:, None, None]


DENOISER = Path(__file__).with_name(
    "denoiser.safetensors"
)  # a `neurst.imaging.tgv.LearnedTGV`, which benchmarks/train_denoiser.py writes


@functools.cache
def pretrained_weight_net() -> WeightNet:
    """The network of the denoiser that ships with the package. All callers share it, so it is not to be trained further or moved to another device."""
    config, weights = (storage.load(DENOISER)[1][name] for name in ("config", "weights"))
    net = WeightNet((1.0, 1.0), config["width"], config["depth"], config["log_range"])
    net.load_state_dict(
        {n.removeprefix("net."): torch.from_numpy(w) for n, w in weights.items() if n.startswith("net.")}
    )
    return net.eval().requires_grad_(False)
