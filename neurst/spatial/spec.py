"""What is fitted to spots: the choices of a caller, and further numerical settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from neurst.core.arguments import AUTO, SHARE, check_fields, number, whole
from neurst.core.fit import FitConfig, resolve_device
from neurst.core.nets import NETWORKS, Network, Siren, Spline
from neurst.core.penalty import PENALTIES, Penalty, SpaceVariantTV
from neurst.core.spec import named
from neurst.core.tuning import LineSearch
from neurst.spatial.priors import LARGE_PENALTIES, Constant, GaussianProcess, Prior, named_penalties, prior_to_dict


@dataclass(frozen=True)
class Candidate:
    """A kind of fit that may be a member of the average: a prior, and the network that it regularises, if any."""

    name: str
    prior: Prior
    network: Network | None = None


@dataclass(frozen=True)
class ExpressionConfig:
    """Numerical settings of the fit of an expression field.

    Parameters
    ----------
    steps
        Optimisation steps of a final fit.
    omega, rank
        Frequency of the default network and number of latent channels, on sections of up to `growth_from` spots.
    growth_from, growth, most_rank
        On larger sections both are multiplied by ``(N / growth_from) ** growth``, the rank up to `most_rank`; and a spline is a second network.
    learning_rate, trial_learning_rate
        Learning rates at the first step of a final fit, and of a trial: a short fit that is scored on held-out spots.
    n_regularisation, refresh_every
        Regularisation points drawn for one step; steps between refreshes of an adaptive penalty.
    space_variant_to
        On sections with more spots than this, the space-variant penalty is left out to save time.
    spline_cells, spline_grids
        Cells of the finest grid of the spline along the longest side, as a share of ``N ** (1 / d)``, and number of grids, each with half the
        cells of the next.
    spline_steps, spline_learning_rate, spline_batch_spots, spline_batch_share, most_spline_batch_spots, spline_regularisation
        The same numbers for a spline, which needs more points in each step, as every point reaches a few coefficients only.
    batch_spots, batch_share, most_batch_spots
        Number of spots in one step: `batch_spots`, or `batch_share` of all spots if that is more, but at most `most_batch_spots`. Steps with 512
        of 2,911 spots reach the score of steps with all spots in a quarter of the time.
    least_batch_spots, dense_values
        A batch holds at most `dense_values` values, unless it would have fewer than `least_batch_spots` spots. A matrix of up to `dense_values`
        values is made dense as a whole.
    latent_genes, trial_genes
        Largest number of genes that a latent field is fitted to, and of genes in a trial: the most variable ones. Loadings of the other genes
        are solved for on the latent field.
    lam, lam_space_variant, search_ratio, search_steps, held_out
        First strength that is tried, in nats (natural-log units of likelihood), and the same for the space-variant penalty, whose weights make
        a nat count for more; factor between neighbouring strengths; largest number of
        steps in one direction; share of the spots that is held out.
    trial_share
        Steps of a trial, as a share of the steps of a final fit. A trial of a spline has the same steps with this share of the spots in each.
    fold_spots, most_folds
        A section of N spots is divided into training and held-out spots ``fold_spots / N`` times, rounded, at least once and at most
        `most_folds` times: a few held-out spots make a noisy choice.
    least_process_spots, most_process_spots
        A Gaussian process is fitted to at most `most_process_spots` spots and `dense_values` values, but at least to `least_process_spots` spots.
    process_lam
        First strength of a Gaussian process that is tried, as a multiple of the strength with the largest marginal likelihood.
    least_weight
        Members with less weight than this in the average are not fitted to all spots.
    weight_prior
        Strength, in nats, with which weights are drawn towards the average of the networks alone: this times the squared distance of the
        weights from theirs is added to the held-out loss.
    most_bumps
        Largest number of local structures that are added to the average, see :mod:`neurst.spatial.local`; 0 adds none.
    scored_values
        Largest number of held-out values that are predicted to score the genes; if there are more, a random subset of the spots is used.
    """

    steps: int = 400
    omega: float = 5.0
    rank: int = 20
    growth_from: int = 5000
    growth: float = 0.25
    most_rank: int = 60
    space_variant_to: int = 20_000
    spline_cells: float = 0.6
    spline_grids: int = 4
    spline_steps: int = 300
    spline_learning_rate: float = 5e-3
    spline_batch_spots: int = 2048
    spline_batch_share: float = 1 / 20
    most_spline_batch_spots: int = 8192
    spline_regularisation: int = 1024
    learning_rate: float = 3e-3
    trial_learning_rate: float = 5e-3
    n_regularisation: int = 128
    refresh_every: int = 25
    batch_spots: int = 512
    batch_share: float = 1 / 32
    most_batch_spots: int = 1024
    least_batch_spots: int = 256
    dense_values: int = 4_000_000
    latent_genes: int = 1000
    trial_genes: int = 500
    lam: float = 400.0
    lam_space_variant: float = 133.0
    search_ratio: float = 3.0
    search_steps: int = 4
    held_out: float = 0.2
    trial_share: float = 0.3
    fold_spots: int = 2000
    most_folds: int = 3
    least_process_spots: int = 4096
    most_process_spots: int = 16384
    process_lam: float = 1.0
    least_weight: float = 0.05
    weight_prior: float = 50.0
    most_bumps: int = 64
    scored_values: int = 20_000_000

    def __post_init__(self):
        check_fields(
            self,
            growth=number(0),
            search_ratio=number(1, above=True),
            batch_share=number(0, 1, above=True),
            spline_cells=number(0, above=True),
            spline_batch_share=number(0, 1, above=True),
            held_out=SHARE,
            least_weight=number(0, 0.5),
            weight_prior=number(0),
            most_bumps=whole(0),
        )

    def batch_points(self, network: Network, n_spots: int, n_genes: int, share: float = 1.0) -> int:
        """Number of spots in one step of a network; `n_genes` is the number of genes times the number of points of a footprint."""
        if isinstance(network, Spline):
            wanted = np.clip(
                int(n_spots * self.spline_batch_share), self.spline_batch_spots, self.most_spline_batch_spots
            )
        else:
            wanted = np.clip(int(n_spots * self.batch_share), self.batch_spots, self.most_batch_spots)
        return max(self.least_batch_spots, min(int(wanted * share), self.dense_values // n_genes))


@dataclass(frozen=True)
class ExpressionSpec:
    """All choices of a fit to spots.

    Parameters
    ----------
    penalties
        Regularisers of the latent field, and other members of the average.
    networks
        Networks of the latent field. The first is fitted with each penalty, the others with the first penalty only.
    rank
        Number r of latent channels, lowered if there are fewer spots or genes.
    n_members
        Number of fits of networks that are averaged; they cycle through the candidates.
    lam
        Prior strength in nats; None chooses it for each penalty.
    search
        Settings of the search for a strength; a start of None is the first strength that suits each penalty.
    fit
        Settings of a final fit.
    config
        Further numerical settings.
    """

    penalties: tuple[Prior, ...]
    networks: tuple[Network, ...]
    rank: int
    n_members: int
    lam: float | None
    search: LineSearch
    fit: FitConfig
    config: ExpressionConfig

    def candidates(self) -> list[Candidate]:
        """The kinds of fits that may be members, each with a distinct name; the constant is not among them."""
        first, *others = self.networks
        pairs: list[tuple[Prior, Network | None]] = []
        for prior in self.penalties:
            if isinstance(prior, Penalty):
                new = all(network is None for _, network in pairs)
                pairs += [(prior, first)] + ([(prior, other) for other in others] if new else [])
            elif isinstance(prior, GaussianProcess):
                pairs.append((prior, None))
        names = []
        for prior, network in pairs:
            name = prior_to_dict(prior)["name"]
            names.append(name if network in (None, first) else f"{name}_{NETWORKS.to_dict(network)['name']}")
        return [
            Candidate(f"{name}_{names[:k].count(name) + 1}" if name in names[:k] else name, prior, network)
            for k, (name, (prior, network)) in enumerate(zip(names, pairs, strict=True))
        ]

    @property
    def has_constant(self) -> bool:
        """Whether the constant takes part in the average."""
        return any(isinstance(prior, Constant) for prior in self.penalties)

    @property
    def has_spread(self) -> bool:
        """Whether the field has a standard deviation, which comes from a Gaussian process."""
        return any(isinstance(prior, GaussianProcess) for prior in self.penalties)

    @property
    def together(self) -> bool:
        """Whether the fits run at the same time, each on one core: on a CPU, unless the steps of a spline keep several cores busy."""
        large_steps = len(self.networks) > 1 and any(isinstance(network, Spline) for network in self.networks)
        return not large_steps and resolve_device(self.fit.device).type == "cpu"

    def without_penalty(self) -> ExpressionSpec:
        """The same networks alone, with a strength of 0."""
        penalties = tuple(prior for prior in self.penalties if isinstance(prior, Penalty)) or (
            PENALTIES.get_spec("isotropic"),
        )
        return replace(self, penalties=penalties, lam=0.0)

    def fit_of(
        self, network: Network, n_spots: int, n_genes: int, *, trial: bool = False, random_state: int | None = None
    ) -> FitConfig:
        """Settings of a final fit of a network, or of a trial; `n_genes` as in :meth:`ExpressionConfig.batch_points`."""
        config, fit = self.config, self.fit
        seed = fit.random_state if random_state is None else random_state
        if isinstance(network, Spline):
            share = config.trial_share if trial else 1.0
            fit = replace(fit, steps=min(fit.steps, config.spline_steps), learning_rate=config.spline_learning_rate)
            fit = replace(fit, n_regularisation=config.spline_regularisation)
        else:
            share = 1.0
            if trial:
                fit = replace(fit, steps=self.search.steps, learning_rate=config.trial_learning_rate)
        batch = fit.batch_points or config.batch_points(network, n_spots, n_genes, share)
        return replace(fit, batch_points=batch, random_state=seed)

    def search_of(self, candidate: Candidate) -> LineSearch:
        """The search for the strength of a candidate, with no value left at None."""
        config = self.config
        if candidate.network is None:
            return LineSearch(config.process_lam, config.search_ratio, config.search_steps, self.search.fraction, 1)
        start = config.lam_space_variant if isinstance(candidate.prior, SpaceVariantTV) else config.lam
        return self.search.with_defaults(LineSearch(start=start))

    def member_seed(self, member: int) -> int:
        """Seed of a member: the first has the seed of the fit, the others have seeds drawn from it."""
        drawn = np.random.default_rng(self.fit.random_state).integers(2**31, size=max(member, 1))
        return self.fit.random_state if member == 0 else int(drawn[member - 1])

    def n_folds(self, n_spots: int) -> int:
        """Number of divisions of the spots into training and held-out spots."""
        return int(np.clip(round(self.config.fold_spots / max(n_spots, 1)), 1, self.config.most_folds))

    def planned_steps(self, n_spots: int) -> int:
        """Largest number of steps of the whole fit, for progress bars."""
        networks = [candidate.network for candidate in self.candidates() if candidate.network is not None]
        trials = (self.search.max_steps + 2 if self.lam is None else 1) * self.n_folds(n_spots)
        return (
            trials * sum(self.fit_of(network, n_spots, 1, trial=True).steps for network in networks)
            + self.n_members * self.fit.steps
        )


def named_networks(
    network: str | Network | Sequence[str | Network], default: tuple[Network, ...]
) -> tuple[Network, ...]:
    """The networks that are fitted, without duplicates; `default` for ``"auto"``."""
    if isinstance(network, str) and network == "auto":
        return default
    several = (
        tuple(network)
        if isinstance(network, Sequence) and not isinstance(network, str) and len(network)
        else (network,)
    )
    found = tuple(dict.fromkeys(NETWORKS.get_spec((AUTO | named(NETWORKS))("network", each)) for each in several))
    for spec in found:
        NETWORKS.to_dict(spec)  # raises now, not after the fit, if the network cannot be stored
    return found


def specify(
    n_spots: int,
    n_dims: int = 2,
    *,
    penalty: str | Prior | Sequence[str | Prior] = "auto",
    network: str | Network | Sequence[str | Network] = "auto",
    rank: int | Literal["auto"] = "auto",
    n_members: int = 2,
    lam: float | Literal["auto"] = "auto",
    steps: int | Literal["auto"] = "auto",
    search: LineSearch = LineSearch(),
    random_state: int = 0,
    device: str = "auto",
    config: ExpressionConfig = ExpressionConfig(),
) -> ExpressionSpec:
    """What :func:`neurst.tl.neurtv_fit` fits to `n_spots` spots, given its arguments of the same names.

    On a section of N > 5,000 spots the scale of the default network shrinks with the fourth root of N, the rank grows with it, and a spline with
    about 3 spots in each of its finest cells is a second network, fitted with the first penalty.
    """
    growth = max(1.0, n_spots / config.growth_from) ** config.growth
    networks: tuple[Network, ...] = (Siren(omega=round(config.omega * growth, 1)),)
    if n_spots > config.growth_from:
        if (penalty, network) == ("auto", "auto") and n_spots > config.space_variant_to:
            penalty = LARGE_PENALTIES
        cells = config.spline_cells * n_spots ** (1 / n_dims)
        grids = (max(2, round(cells / 2**k)) for k in reversed(range(config.spline_grids)))
        networks = (*networks, Spline(tuple(dict.fromkeys(grids))))
    rank = min(round(config.rank * growth), max(config.rank, config.most_rank)) if rank == "auto" else rank
    steps = config.steps if steps == "auto" else steps
    trial_steps = max(1, round(config.trial_share * steps))
    default = LineSearch(None, config.search_ratio, config.search_steps, config.held_out, trial_steps)
    return ExpressionSpec(
        penalties=named_penalties(penalty),
        networks=named_networks(network, networks),
        rank=rank,
        n_members=n_members,
        lam=None if lam == "auto" else lam,
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
