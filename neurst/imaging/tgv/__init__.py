"""Total generalised variation of pictures: the classic solver, and networks that predict its weights."""

from neurst.imaging.tgv.classic import Solution, tgv, tv
from neurst.imaging.tgv.learned import LearnedConfig, LearnedTGV, add_noise, fit_reconstructor, pretrained_denoiser
from neurst.imaging.tgv.solver import SolverConfig

__all__ = [
    "LearnedConfig",
    "LearnedTGV",
    "Solution",
    "SolverConfig",
    "add_noise",
    "fit_reconstructor",
    "pretrained_denoiser",
    "tgv",
    "tv",
]
