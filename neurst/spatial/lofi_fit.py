"""Training of local fields: spots, and discs around them, are hidden and predicted from the spots that are left."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from neurst.core.fit import OnStep
from neurst.core.likelihood import Poisson
from neurst.core.progress import OnProgress, StepCounter
from neurst.core.train import TrainConfig, seeded, train
from neurst.spatial.data import SpotData
from neurst.spatial.geometry import kd_tree
from neurst.spatial.loadings import signs
from neurst.spatial.lofi import LocalNet, LoFiConfig, LoFiSpots, heads
from neurst.spatial.lofi_encoder import Encoded, Encoder, section_rates
from neurst.spatial.matrix import Matrix, dense, gene_chunks, moments, spot_chunks

AGREEING = 12  # neighbours whose mean is compared with a spot, to find the channels that they share
LEAST_VARIANCE = 0.05  # of a channel that is kept, relative to the largest one that noise gives
LEAST_DISC = 6  # spots that the largest disc holds at least
WARM_UP = 50  # steps
CHECK_EVERY = 50  # steps between scores of the spots that a member is not trained on
MOST_CHECKED = 4000  # of these spots
NEWTON_STEPS, LONGEST_STEP = 8, 0.5  # of the loadings of a gene
LARGEST_LOG_MEAN = 12.0
INTERCEPT_PRIOR = 1e-3


@dataclass(frozen=True, eq=False)
class Draws:
    """Hidden spots of a section and what their neighbours tell: heads (n, H, r + 1), explained (n, H), and indices of the spots (n,)."""

    data: SpotData
    section: Encoded
    heads: Tensor
    explained: Tensor
    spots: NDArray

    def take(self, rows: NDArray) -> Draws:
        """Some of the draws."""
        return dataclasses.replace(self, heads=self.heads[rows], explained=self.explained[rows], spots=self.spots[rows])

    def targets(self, genes: NDArray) -> Targets:
        """What is to be predicted of some genes, of which the section may lack some."""
        known = {name: i for i, name in enumerate(self.data.genes)}
        columns = np.array([known.get(name, -1) for name in genes])
        has, columns = torch.from_numpy(columns >= 0).float(), np.maximum(columns, 0)
        log_rate = torch.from_numpy(self.section.log_rate[columns]).float()
        log_size = torch.from_numpy(np.log(self.data.observation.size)).float()
        return Targets(self.data.values[:, columns], log_size, log_rate, has)


@dataclass(frozen=True, eq=False)
class Targets:
    """Counts of some genes of a section: values (N, C), log library sizes (N,), log mean rates (C,), and 0 where a gene is not measured (C,)."""

    values: Matrix
    log_size: Tensor
    log_rate: Tensor
    mask: Tensor

    def of(self, spots: NDArray) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, predictors of the mean rates and the mask of some spots, (n, C) each."""
        counts = torch.from_numpy(dense(self.values[spots])).float() * self.mask
        offset = self.log_size[spots][:, None] + self.log_rate
        return counts, offset, self.mask.expand_as(counts)


def fit_lofi(
    sections: Sequence[SpotData],
    config: LoFiConfig = LoFiConfig(),
    *,
    device: str = "auto",
    random_state: int = 0,
    on_progress: OnProgress | None = None,
) -> LoFiSpots:
    """Train a local field on the counts of sections, which need not be registered, nor measure the same genes.

    Parameters
    ----------
    sections
        Counts of one section each. The genes of the first one can be predicted; further sections may lack some of them.
    config
        Numbers of the field and its training.
    device
        ``"auto"``, or a torch device name.
    random_state
        Seed of every draw.
    on_progress
        Called after each step with the steps done, the steps planned and the name of the stage.

    Returns
    -------
    LoFiSpots
        The field.

    Raises
    ------
    ValueError
        If a section has none of the genes from which latents are read, the most variable ones of the first section.

    Examples
    --------
    >>> from neurst.spatial.observation import Counts
    >>> rng = np.random.default_rng(0)
    >>> coords = rng.random((60, 2))
    >>> counts = rng.poisson(np.exp(1 + coords[:, :1] * [2.0, -2.0, 0.0]))
    >>> data = SpotData(coords, counts, np.array(["a", "b", "c"]), Counts(np.full(60, 15.0)))
    >>> model = fit_lofi([data], LoFiConfig(steps=5, n_members=1, width=8))
    >>> model.rates(data).shape
    (60, 3)
    """
    rng = np.random.default_rng(random_state)
    encoder = learn_encoder(sections, config)
    draws = [draw_hidden(data, encoder, config, rng) for data in sections]
    counter, members = StepCounter(on_progress), []
    for number in range(config.n_members):
        numbers = TrainConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            warm_up=WARM_UP,
            random_state=random_state + number,
            device=device,
        )
        stage = counter.stage(f"member {number + 1} of {config.n_members}", config.steps)
        members.append(_fit_member(draws, encoder, config, numbers, stage, rng))
    genes = sections[0].genes
    stage = counter.stage("loadings of further genes", len(members))
    for number, net in enumerate(members):
        members[number] = _with_all_genes(net, draws, encoder, genes, config)
        stage(number, np.nan)
    return LoFiSpots(genes, encoder, tuple(members), config, sections[0].coords.shape[1])


def learn_encoder(sections: Sequence[SpotData], config: LoFiConfig) -> Encoder:
    r"""Directions in which a spot agrees with its neighbours: eigenvectors of the covariance between residuals of a spot and of its 12 neighbours.

    The noise of counts is independent between spots, so that it adds nothing to this covariance on average, and as many negative eigenvalues as
    positive ones. The most negative one tells how large an eigenvalue noise can give.
    """
    genes = _variable_genes(sections[0], config.most_genes)
    total = sections[0].observation.size.sum() * section_rates(sections[0])[genes]
    blank = Encoder(sections[0].genes[genes], total / total.sum(), np.eye(len(genes)), np.ones(len(genes)), 1.0)
    covariance = np.zeros((len(genes), len(genes)))
    for number, data in enumerate(sections):
        if not np.isin(blank.genes, data.genes).any():
            msg = (
                f"`sections[{number}]` has none of the {len(blank.genes)} most variable genes of the first section, such as {str(blank.genes[0])!r}: "
                "use the same kind of gene names, or leave this section out"
            )
            raise ValueError(msg)
        here, lagged = _agreement(data, blank)
        covariance[np.ix_(here, here)] += (lagged + lagged.T) / 2
    sizes = [blank.sizes(data)[0] for data in sections]
    value, vector = np.linalg.eigh(covariance)
    edge, value, vector = max(-value[0], 1e-12), value[::-1], vector[:, ::-1]
    kept = int(np.clip((value > config.noise_edge * edge).sum(), 1, min(config.rank, len(genes))))
    variance = np.maximum(value[:kept] - edge, LEAST_VARIANCE * edge) / sum(size.sum() for size in sizes)
    directions = vector[:, :kept] * signs(vector[:, :kept])
    return dataclasses.replace(blank, directions=directions, variance=variance, precision=float(sizes[0].mean()))


def _variable_genes(data: SpotData, most: int) -> NDArray:
    """Indices of the most variable genes that have counts, ascending."""
    mean, sd = moments(data.values)
    found = np.flatnonzero(mean > 0)
    return np.sort(found[np.argsort(-(sd[found] ** 2 / mean[found]), kind="stable")[:most]])


def _agreement(data: SpotData, encoder: Encoder) -> tuple[NDArray, NDArray]:
    """The genes at hand, and the covariance (C, C) between residuals of spots and the mean residual of the neighbours, summed over spots."""
    here, there = encoder.columns(data.genes)
    size, share = encoder.sizes(data)
    n = len(size)
    near = kd_tree(data.coords).query(data.coords, min(AGREEING + 1, n))[1]
    # at shared positions the spot itself need not come first
    own = near == np.arange(n)[:, None]
    own[~own.any(1), -1] = True
    near = near[~own].reshape(n, -1)
    pattern = np.ones(near.size), (np.arange(n).repeat(near.shape[1]), near.ravel())
    around = sparse.csr_array(pattern, shape=(n, n))
    values, scale = data.values[:, there], 1 / np.sqrt(encoder.share[here])
    total = np.zeros((len(here), len(here)))
    for rows in spot_chunks(n, len(here)):
        own = dense(values[rows]) - np.outer(size[rows], share)
        nearby = around[rows]
        mean = dense(nearby @ values) / (nearby @ size)[:, None] - share
        total += (own * scale).T @ (mean * scale)
    return here, total


def draw_hidden(data: SpotData, encoder: Encoder, config: LoFiConfig, rng: np.random.Generator) -> Draws:
    """Spots in some rounds, each with its neighbours outside a disc; in every second round the disc holds nothing but the spot."""
    section, n, parts = encoder.read(data, config.latent_limit), len(data.coords), []
    largest = max(2, min(n // 2, max(LEAST_DISC, int(config.hidden_share * n))))
    for part in range(config.rounds):
        order = rng.permutation(n)[: max(1, config.most_draws // config.rounds)]
        for start in range(0, len(order), config.batch):
            middle = order[start : start + config.batch]
            alone = part % 2 == 0
            counts = np.ones(len(middle)) if alone else np.exp(rng.uniform(np.log(2), np.log(largest), len(middle)))
            parts.append(_hide(section, middle, counts.astype(int), encoder, config, rng))
    spots, means, explained = zip(*parts, strict=True)
    return Draws(data, section, torch.cat(means), torch.cat(explained), np.concatenate(spots))


def _hide(
    section: Encoded, middle: NDArray, counts: NDArray, encoder: Encoder, config: LoFiConfig, rng: np.random.Generator
) -> tuple[NDArray, Tensor, Tensor]:
    """A random spot of each disc, which holds the given number of spots around its middle, with the heads at that spot."""
    distance, index = section.tree.query(section.coords[middle], int(counts.max()) + 1)
    rows = np.arange(len(middle))
    spots = index[rows, (rng.random(len(middle)) * counts).astype(int)]
    radius = distance[rows, counts - 1]
    near = section.neighbours(section.coords[spots], config.n_neighbours, section.coords[middle], radius)
    return spots, *heads(section, section.coords[spots], *near, encoder, config)


def _fit_member(
    draws: Sequence[Draws],
    encoder: Encoder,
    config: LoFiConfig,
    numbers: TrainConfig,
    stage: OnStep,
    rng: np.random.Generator,
) -> LocalNet:
    """A network trained on most spots, at the step at which it predicts the others best."""
    chosen = [_held_out(len(part.data.coords), config.held_out, rng) for part in draws]
    taught = [part.take(np.flatnonzero(~out[part.spots])) for part, out in zip(draws, chosen, strict=True)]
    asked = [part.take(np.flatnonzero(out[part.spots])) for part, out in zip(draws, chosen, strict=True)]
    with seeded(numbers.random_state):  # of the starting weights and of dropout
        net = LocalNet(config.n_heads, len(encoder.variance), len(encoder.genes), config)
        net.gate.data = gates(taught, encoder, config)
        loadings, intercept = solve_loadings(net, taught, encoder.genes, config)
        net.loadings.data, net.intercept.data = loadings, intercept
        best = _Best(
            net, [_sample(part, MOST_CHECKED // len(draws), rng) for part in asked], encoder.genes, stage, config.steps
        )
        train(net, _Batches(taught, encoder.genes, config.batch), _Loss(net, taught, config), numbers, on_step=best)
    net.load_state_dict(best.weights)
    return net.eval()


def _held_out(n: int, share: float, rng: np.random.Generator) -> NDArray:
    """A random share of n spots, at least one; at least one other spot is left."""
    out = np.zeros(n, dtype=bool)
    out[rng.permutation(n)[: min(n - 1, max(1, round(share * n)))]] = True
    return out


def _sample(part: Draws, most: int, rng: np.random.Generator) -> Draws:
    return part.take(rng.permutation(len(part.spots))[:most])


def gates(draws: Sequence[Draws], encoder: Encoder, config: LoFiConfig) -> Tensor:
    """(H, r) weights of the heads in each channel: ridge regression of the latents of hidden spots, towards the mean of the heads."""
    n_heads, rank = config.n_heads, len(encoder.variance)
    gram, cross = torch.zeros(rank, n_heads, n_heads).double(), torch.zeros(rank, n_heads, 1).double()
    for part in draws:
        x = part.heads[..., :-1].double().permute(2, 0, 1)  # (r, n, H)
        y = torch.from_numpy(part.section.latent[part.spots, :-1]).T[..., None]
        weight = torch.from_numpy(np.outer(encoder.variance, part.section.precision[part.spots]) / config.rounds)
        gram += x.mT @ (weight[..., None] * x)
        cross += x.mT @ (weight[..., None] * y)
    ridge = config.gate_prior * torch.eye(n_heads).double()
    return torch.linalg.solve(gram + ridge, cross + config.gate_prior / n_heads)[..., 0].T.float().contiguous()


@torch.no_grad()
def solve_loadings(
    net: LocalNet, draws: Sequence[Draws], genes: NDArray, config: LoFiConfig
) -> tuple[Tensor, Tensor]:  # -> (G, r), (G,)
    """Loadings and intercepts of genes on the latents of a network: the largest posterior density of the counts of hidden spots, by Newton steps."""
    latent = torch.cat([net.latent(part.heads, part.explained) for part in draws])
    features = torch.cat([torch.ones(len(latent), 1), latent], 1)
    found = []
    for chunk in gene_chunks((len(latent), len(genes))):
        parts = [part.targets(genes[chunk]).of(part.spots) for part in draws]
        found.append(_newton(features, *map(torch.cat, zip(*parts, strict=True)), config))
    beta = torch.cat(found)
    return beta[:, 1:].contiguous(), beta[:, 0].contiguous()


def _newton(features: Tensor, counts: Tensor, offset: Tensor, mask: Tensor, config: LoFiConfig) -> Tensor:
    """Coefficients (C, 1 + r) of Poisson regressions; no entry moves by more than half a log unit in a step."""
    k = features.shape[1]
    prior = torch.full((k,), config.loading_prior * config.rounds)
    prior[0] = INTERCEPT_PRIOR * config.rounds
    products = (features[:, :, None] * features[:, None, :]).flatten(1)
    beta = torch.zeros(counts.shape[1], k)
    for _ in range(NEWTON_STEPS):
        mean = (offset + features @ beta.T).clamp(max=LARGEST_LOG_MEAN).exp() * mask
        slope = (mean - counts).T @ features + prior * beta
        curve = (mean.T @ products).view(-1, k, k) + torch.diag(prior)
        move = torch.linalg.solve(curve, slope)
        beta -= move * (LONGEST_STEP / move.abs().amax(1, keepdim=True).clamp(min=LONGEST_STEP))
    return beta


class _Batches:
    """Draws a section, by its number of draws, and some of its draws."""

    def __init__(self, draws: Sequence[Draws], genes: NDArray, size: int):
        self.draws, self.size = draws, size
        self.targets = [part.targets(genes) for part in draws]
        self.shares = torch.tensor([float(len(part.spots)) for part in draws])

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        section = int(torch.multinomial(self.shares, 1, generator=generator))
        part = self.draws[section]
        rows = torch.randint(len(part.spots), (self.size,), generator=generator)
        return part.heads[rows], part.explained[rows], *self.targets[section].of(part.spots[rows.numpy()])


class _Loss:
    """Mean negative log-likelihood of a count, with a prior that holds the loadings near where they start."""

    def __init__(self, net: LocalNet, draws: Sequence[Draws], config: LoFiConfig):
        self.start = net.loadings.detach().clone()
        self.strength = config.change_prior * config.rounds / sum(len(part.spots) for part in draws) / 2

    def __call__(self, net: LocalNet, batch: tuple[Tensor, ...]) -> Tensor:
        device = net.loadings.device
        moved = (net.loadings - self.start.to(device)).square().sum()
        return mean_loss(net, batch) + self.strength * moved / len(net.loadings)


def mean_loss(net: LocalNet, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean negative log-likelihood of a count that Poisson noise about a prediction gives, ()."""
    inputs, explained, counts, offset, mask = (part.to(net.loadings.device) for part in batch)
    eta = net(inputs, explained) + offset
    return Poisson()(eta, counts, mask) / counts.numel()


class _Best:
    """Follows a training, and keeps the weights that predict spots best that it does not see."""

    def __init__(self, net: LocalNet, draws: Sequence[Draws], genes: NDArray, stage: OnStep, steps: int):
        self.net, self.stage, self.steps, self.lowest, self.weights = (
            net,
            stage,
            steps,
            np.inf,
            copy.deepcopy(net.state_dict()),
        )
        asked = [part for part in draws if len(part.spots)]
        self.batches = [(part.heads, part.explained, *part.targets(genes).of(part.spots)) for part in asked]
        self._check()

    def __call__(self, step: int, objective: float) -> None:
        if (step + 1) % CHECK_EVERY == 0 or step == self.steps - 1:
            self._check()
        self.stage(step, objective)

    @torch.no_grad()
    def _check(self) -> None:
        self.net.eval()
        loss = sum(float(mean_loss(self.net, batch)) * batch[2].numel() for batch in self.batches)
        self.net.train()
        if loss < self.lowest or not self.batches:  # without held-out draws, the last weights are kept
            self.lowest = loss
            self.weights = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}


def _with_all_genes(
    net: LocalNet, draws: Sequence[Draws], encoder: Encoder, genes: NDArray, config: LoFiConfig
) -> LocalNet:
    """The network with loadings of all genes; those of genes that it was not trained on are solved for."""
    further = np.setdiff1d(genes, encoder.genes)
    names, loadings, intercept = encoder.genes, net.loadings.detach(), net.intercept.detach()
    if len(further):
        more = solve_loadings(net, draws, further, config)
        names = np.concatenate([names, further])
        loadings, intercept = torch.cat([loadings, more[0]]), torch.cat([intercept, more[1]])
    place = {name: i for i, name in enumerate(names)}
    order = torch.tensor([place[name] for name in genes])
    whole = copy.deepcopy(net)
    whole.loadings, whole.intercept = nn.Parameter(loadings[order]), nn.Parameter(intercept[order])
    return whole.eval()
