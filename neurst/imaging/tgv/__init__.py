"""Total generalised variation of pictures: the classic solver, and networks that predict its weights."""

from neurst.imaging.tgv.classic import Solution, tgv, tv
from neurst.imaging.tgv.learned import LearnedConfig, LearnedTGV, pretrained_denoiser
from neurst.imaging.tgv.solver import SolverConfig
from neurst.imaging.tgv.training import add_noise, fit_reconstructor

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
