"""What is fitted to spots: the choices of a caller, and further numerical settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from neurst.core.arguments import AUTO, SHARE, check_fields, number, shown
from neurst.core.fit import FitConfig
from neurst.core.nets import NETWORKS, Network, Siren
from neurst.core.penalty import PENALTIES, Penalty
from neurst.core.spec import named
from neurst.core.tuning import LineSearch
from neurst.spatial.evaluate.splits import Holdout

DEFAULT_PENALTIES = ("nuclear", "space_variant")
POSITION_PENALTIES = tuple(sorted(name for name, cls in PENALTIES.items() if not cls.needs_spectrum))


@dataclass(frozen=True)
class ExpressionConfig:
    """Numerical settings of the fit of an expression field.

    Parameters
    ----------
    steps, omega
        Optimisation steps of a final fit, and frequency of the default network, on sections of up to `growth_from` spots.
    growth_from, growth
        On larger sections both are multiplied by ``(N / growth_from) ** growth``.
    learning_rate, trial_learning_rate
        Learning rates at the first step of a final fit, and of a trial: a short fit that is scored on held-out spots.
    n_regularisation, refresh_every
        Regularisation points drawn for one step; steps between refreshes of an adaptive penalty.
    batch_spots, batch_share, most_batch_spots
        Number of spots in one step: `batch_spots`, or `batch_share` of all spots if that is more, but at most `most_batch_spots`. Steps with 512
        of 2,911 spots reach the score of steps with all spots in a quarter of the time.
    least_batch_spots, dense_values
        A batch holds at most `dense_values` values, unless it would have fewer than `least_batch_spots` spots. A matrix of up to `dense_values`
        values is made dense as a whole.
    latent_genes, trial_genes
        Largest number of genes that a latent field is fitted to, and of genes in a trial: the most variable ones. Loadings of the other genes
        are solved for on the latent field.
    lam, search_ratio, search_steps, held_out
        First strength that is tried, in nats (natural-log units of likelihood); factor between neighbouring strengths; largest number of
        steps in one direction; share of the spots that is held out.
    trial_share
        Steps of a trial, as a share of the steps of a final fit.
    least_weight
        Penalties with less weight than this in the average are not fitted to all spots.
    weight_step
        Amount that is moved from one weight to another while that lowers the held-out loss.
    scored_values
        Largest number of held-out values that are predicted to score the genes; if there are more, a random subset of the spots is used.
    """

    steps: int = 500
    omega: float = 5.0
    growth_from: int = 5000
    growth: float = 0.25
    learning_rate: float = 3e-3
    trial_learning_rate: float = 5e-3
    n_regularisation: int = 128
    refresh_every: int = 25
    batch_spots: int = 512
    batch_share: float = 1 / 32
    most_batch_spots: int = 8192
    least_batch_spots: int = 256
    dense_values: int = 4_000_000
    latent_genes: int = 1000
    trial_genes: int = 500
    lam: float = 400.0
    search_ratio: float = 3.0
    search_steps: int = 4
    held_out: float = 0.2
    trial_share: float = 0.4
    least_weight: float = 0.1
    weight_step: float = 0.05
    scored_values: int = 20_000_000

    def __post_init__(self):
        check_fields(
            self,
            growth=number(0),
            search_ratio=number(1, above=True),
            batch_share=number(0, 1, above=True),
            held_out=SHARE,
            least_weight=number(0, 0.5),
            weight_step=number(0, 0.5, above=True),
        )

    def batch_points(self, n_spots: int, n_genes: int) -> int:
        """Number of spots in one step; `n_genes` is the number of genes times the number of points of a footprint."""
        batch = int(np.clip(int(n_spots * self.batch_share), self.batch_spots, self.most_batch_spots))
        return max(self.least_batch_spots, min(batch, self.dense_values // n_genes))


@dataclass(frozen=True)
class ExpressionSpec:
    """All choices of a fit to spots.

    Parameters
    ----------
    penalties
        Regularisers of the latent field; several are averaged.
    network
        Network of the latent field.
    rank
        Number r of latent channels, lowered if there are fewer spots or genes.
    n_members
        Number of fits that are averaged; they cycle through the penalties.
    lam
        Prior strength in nats; None chooses it for each penalty.
    holdout
        How spots are held out for the choices and scores: ``"random"`` or ``"block"``.
    search
        Settings of the search for a strength, none of them None.
    fit
        Settings of a final fit.
    config
        Further numerical settings.
    """

    penalties: tuple[Penalty, ...]
    network: Network
    rank: int
    n_members: int
    lam: float | None
    holdout: Holdout
    search: LineSearch
    fit: FitConfig
    config: ExpressionConfig

    def labels(self) -> list[str]:
        """A distinct name for each penalty."""
        names = [PENALTIES.to_dict(penalty)["name"] for penalty in self.penalties]
        return [f"{n}_{names[:k].count(n) + 1}" if n in names[:k] else n for k, n in enumerate(names)]

    def member_seed(self, member: int) -> int:
        """Seed of a member: the first has the seed of the fit, the others have seeds drawn from it."""
        drawn = np.random.default_rng(self.fit.random_state).integers(2**31, size=max(member, 1))
        return self.fit.random_state if member == 0 else int(drawn[member - 1])

    def planned_steps(self) -> int:
        """Largest number of steps of the whole fit, for progress bars."""
        trials = (self.search.max_steps + 2 if self.lam is None else 1) * len(self.penalties)
        return trials * self.search.steps + self.n_members * self.fit.steps


def named_penalties(penalty: str | Penalty | Sequence[str | Penalty]) -> tuple[Penalty, ...]:
    """The penalties that are averaged, without duplicates.

    Raises
    ------
    TypeError, ValueError
        If one of them is unknown, needs a spectral axis, or cannot be stored.
    """
    if isinstance(penalty, str) and penalty == "auto":
        return tuple(PENALTIES.get_spec(name) for name in DEFAULT_PENALTIES)
    several = tuple(penalty) if isinstance(penalty, Sequence) and not isinstance(penalty, str) else (penalty,)
    choices = f"expected 'auto' alone, or one or more of {list(POSITION_PENALTIES)} or of specifications such as `{PENALTIES.example}`"
    if not several:
        msg = f"`penalty={penalty!r}` is empty: {choices}"
        raise ValueError(msg)
    out = []
    for each in several:
        if isinstance(each, str) and each not in PENALTIES or not isinstance(each, (str, Penalty)):
            msg = f"`penalty={shown(penalty)}`: {choices}"
            raise (ValueError if isinstance(each, str) else TypeError)(msg)
        spec = PENALTIES.get_spec(each)
        if spec.needs_spectrum:
            msg = f"`penalty={shown(each)}` is for cubes with a spectral axis, which positions lack: {choices}"
            raise ValueError(msg)
        PENALTIES.to_dict(spec)  # raises now, not after the fit, if the penalty cannot be stored
        out.append(spec)
    return tuple(dict.fromkeys(out))


def specify(
    n_spots: int,
    *,
    penalty: str | Penalty | Sequence[str | Penalty] = "auto",
    network: str | Network = "auto",
    rank: int = 20,
    n_members: int = 2,
    lam: float | Literal["auto"] = "auto",
    holdout: Holdout = "random",
    steps: int | Literal["auto"] = "auto",
    search: LineSearch = LineSearch(),
    random_state: int = 0,
    device: str = "auto",
    config: ExpressionConfig = ExpressionConfig(),
) -> ExpressionSpec:
    """What :func:`neurst.tl.neurtv_fit` fits to `n_spots` spots, given its arguments of the same names.

    On a section of N > 5,000 spots the finest scale of the default network and the number of steps grow with the fourth root of N: for
    16 times the spots the scale is half as long and there are twice the steps.
    """
    growth = max(1.0, n_spots / config.growth_from) ** config.growth
    if isinstance(network, str) and network == "auto":
        network = Siren(omega=round(config.omega * growth, 1))
    network = NETWORKS.get_spec((AUTO | named(NETWORKS))("network", network))
    NETWORKS.to_dict(network)  # raises now, not after the fit, if the network cannot be stored
    steps = round(config.steps * growth) if steps == "auto" else steps
    trial_steps = max(1, round(config.trial_share * steps))
    default = LineSearch(config.lam, config.search_ratio, config.search_steps, config.held_out, trial_steps)
    return ExpressionSpec(
        penalties=named_penalties(penalty),
        network=network,
        rank=rank,
        n_members=n_members,
        lam=None if lam == "auto" else lam,
        holdout=holdout,
        search=search.with_defaults(default),
        fit=FitConfig(
            steps=steps,
            learning_rate=config.learning_rate,
            n_regularisation=config.n_regularisation,
            refresh_every=config.refresh_every,
            random_state=random_state,
            device=device,
        ),
        config=config,
    )
