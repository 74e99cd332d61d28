"""Random tensors for tests of laws: float64, from a local generator."""

import torch


def uniform(*shape, seed=0, low=-1.0, high=1.0):
    """Uniform draws between `low` and `high`; by default in the unit box."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def normal(*shape, seed=0):
    """Standard normal draws."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
