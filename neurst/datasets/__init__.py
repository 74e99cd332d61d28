"""Data with a known answer."""

from neurst.datasets.synthetic import SyntheticTissue, synthetic_visium

__all__ = ["SyntheticTissue", "synthetic_visium"]
