"""Random tensors for tests of laws, float64 and from a local generator, and a small network of each kind."""

import torch

from neurst.core.nets import Bumps, Cosine, Fourier, LowRank, Siren, Spline

NETWORKS = {
    "siren": Siren(width=16, depth=2, omega=3.0),
    "fourier": Fourier(width=16, depth=1, n_features=8),
    "lowrank": LowRank(rank=4, width=16),
    "spline": Spline(cells=(2, 4)),
    "cosine": Cosine(waves=4, margin=0.2),
    "bumps": Bumps(width=0.4),
}


def uniform(*shape, seed=0, low=-1.0, high=1.0):
    """Uniform draws between `low` and `high`; by default in the unit box."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def normal(*shape, seed=0):
    """Standard normal draws."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
