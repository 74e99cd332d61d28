"""The options that all fits of pictures, cubes and point clouds share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from neurst.core.arguments import AUTO, FLAG, LAM, SEED, SIZE, check_fields, instance
from neurst.core.fit import DEVICE, FitConfig
from neurst.core.nets import NETWORKS, Network
from neurst.core.penalty import PENALTIES, Penalty
from neurst.core.spec import named
from neurst.core.tuning import SEARCH, LineSearch


@dataclass(frozen=True)
class FitOptions:
    """Choices that every fit offers. The defaults suit most data.

    Parameters
    ----------
    penalty
        Regulariser: a name of :data:`neurst.core.penalty.PENALTIES`, a penalty, or ``"auto"``: space-variant NeurTV
        (:class:`neurst.core.penalty.SpaceVariantTV`).
    network
        A name of :data:`neurst.core.nets.NETWORKS`, a specification such as ``neurst.core.nets.Siren(width=64)``, or ``"auto"``: a cubic spline
        for pictures, cubes and surfaces, a sine network for attributes of points.
    lam
        Prior strength in nats (natural-log units of likelihood), or ``"auto"``: chosen on held-out data for pictures and
        attributes of points, by a formula for cubes and surfaces.
    steps
        Optimisation steps of a fit, or ``"auto"``.
    search
        How ``"auto"`` chooses a strength.
    random_state
        Seed of all random numbers. The same seed on the same machine gives the same results.
    device
        ``"auto"`` is CUDA, else MPS, else the CPU; or the name of a torch device.
    progress
        Show a progress bar.

    Examples
    --------
    >>> FitOptions(penalty="tgv", lam=30).lam
    30.0
    """

    penalty: str | Penalty = "auto"
    network: str | Network = "auto"
    lam: float | str = "auto"
    steps: int | str = "auto"
    search: LineSearch = LineSearch()
    random_state: int = 0
    device: str = "auto"
    progress: bool = True

    def __post_init__(self):
        check_fields(
            self,
            penalty=AUTO | named(PENALTIES),
            network=AUTO | named(NETWORKS),
            lam=LAM,
            steps=AUTO | SIZE,
            search=SEARCH,
            random_state=SEED,
            device=DEVICE,
            progress=FLAG,
        )

    @property
    def given_lam(self) -> float | None:
        """The prior strength in nats; None if it is to be chosen."""
        return None if self.lam == "auto" else self.lam

    def steps_or(self, default: int) -> int:
        """The steps of a fit, which are `default` where the options say ``"auto"``."""
        return default if self.steps == "auto" else self.steps

    def fit_config(self, default: FitConfig) -> FitConfig:
        """Numbers of a fit: those of the method, with the steps, the seed and the device of these options."""
        return dataclasses.replace(
            default, steps=self.steps_or(default.steps), random_state=self.random_state, device=self.device
        )

    def network_or(self, default: Network) -> Network:
        """The network, which is `default` where the options say ``"auto"``."""
        return default if self.network == "auto" else NETWORKS.get_spec(self.network)


OPTIONS = instance(FitOptions, "a `neurst.imaging.FitOptions`, such as FitOptions(lam=30)")
