"""Surfaces from points."""

from neurst.imaging.surface.fit import Surface, SurfaceConfig, fit_surface

__all__ = ["Surface", "SurfaceConfig", "fit_surface"]
