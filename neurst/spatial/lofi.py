r"""Local fields of expression: the value at a point from measured neighbours, by weights and a network that are learned on many sections :cite:p:`Khorashadizadeh2024`.

The counts of a spot are read as r latent channels, the same for all sections. At a point x, each head is a kriging mean of the latents of the
k nearest spots: with the Matern-3/2 kernel :math:`\kappa` of one length and one noise level :math:`\nu`,
:math:`w = (K + \nu\,\mathrm{diag}(\bar n / n_i))^{-1} \kappa(x)`, where :math:`n_i` is the library size of a neighbour. The latent at x is a weighted sum of the heads plus
a correction by a network that sees all heads, and :math:`\log` rate :math:`= \log p_g + b_g + V_g \cdot z(x)` with the mean rates p of the section at hand. Only distances in
units of the typical spacing enter, so that turned, mirrored and rescaled sections, of any platform, give the same. Letters: N spots, G genes, r channels, H heads, k neighbours.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neurst.core import storage
from neurst.core.arguments import POSITIVE, SHARE, check_fields, coordinates, number, several, whole
from neurst.core.train import seeded
from neurst.spatial.data import SpotData
from neurst.spatial.lofi_encoder import Encoded, Encoder

KIND = "lofi_spots"  # of a saved file
FORMAT = 1  # of its content; raise it when the layout changes
QUERIES = 512  # points that are predicted together
HIDDEN_NOISE = 1e4  # noise level of a hidden neighbour, which then has no weight
MOST_NOISE = 50.0  # of a spot with few counts, relative to the typical spot
MATERN = math.sqrt(3)


@dataclass(frozen=True)
class LoFiConfig:
    """Numbers of a local field.

    Parameters
    ----------
    n_neighbours
        Measured spots from which a point is predicted.
    rank
        Most latent channels. Fewer are kept if neighbouring spots do not agree in them.
    noise_edge
        A channel is kept if its agreement between neighbours is this many times the largest one that noise gives.
    lengths, noises
        Kernel lengths, in typical spacings, and noise levels, in units of the prior variance, of the heads: one head for each pair.
    latent_limit
        Latents are squashed to this many standard deviations, so that a single extreme count has a bounded influence.
    width, dropout
        Units in the two hidden layers of the correction, and the share of them that is dropped in a step.
    n_members
        Networks that are averaged. Each is stopped on spots of its own that it is not trained on.
    held_out
        Share of these spots.
    rounds, most_draws
        Hidden spots drawn for training: each spot this many times, at most `most_draws` in each section.
    hidden_share
        In every second round a disc around the spot is hidden as well, of up to this share of the section's spots.
    steps, batch, learning_rate
        Steps of a member, spots in a step, and the learning rate of the first steps.
    gate_prior, loading_prior
        Strength of the priors that hold the weights of the heads near their mean, and loadings near zero.
    change_prior
        Strength of the prior that holds loadings near their starting values during training.
    most_genes
        Most genes from which latents are read and on which members are trained, the most variable ones. Loadings of further genes are solved for.
    """

    n_neighbours: int = 32
    rank: int = 20
    noise_edge: float = 1.2
    lengths: tuple[float, ...] = (1.5, 4.0, 10.0)
    noises: tuple[float, ...] = (0.5, 2.0, 8.0, 30.0)
    latent_limit: float = 4.0
    width: int = 96
    dropout: float = 0.2
    n_members: int = 2
    held_out: float = 0.2
    rounds: int = 8
    most_draws: int = 20_000
    hidden_share: float = 0.04
    steps: int = 1500
    batch: int = 256
    learning_rate: float = 4e-3
    gate_prior: float = 10.0
    loading_prior: float = 3.0
    change_prior: float = 100.0
    most_genes: int = 1000

    def __post_init__(self):
        check_fields(
            self,
            n_neighbours=whole(4),
            lengths=several(POSITIVE),
            noises=several(POSITIVE),
            dropout=number(0, 0.9),
            held_out=SHARE,
            hidden_share=SHARE,
            change_prior=number(0),
        )

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return len(self.lengths) * len(self.noises)


def heads(
    section: Encoded, query: NDArray, index: NDArray, hidden: NDArray, encoder: Encoder, config: LoFiConfig
) -> tuple[Tensor, Tensor]:
    """Kriging means of the latents of neighbours at points: (M, H, r + 1), and the share of the prior variance that each head explains, (M, H)."""
    places = torch.from_numpy(section.coords[index])
    between, away = torch.cdist(places, places), (places - torch.from_numpy(query)[:, None]).norm(dim=2)
    noise = np.minimum(encoder.precision / section.precision[index], MOST_NOISE) + HIDDEN_NOISE * hidden
    noise = torch.diag_embed(torch.from_numpy(noise))
    weights, explained = [], []
    for length in config.lengths:
        kernel, near = (_matern(r / length) for r in (between, away))
        for level in config.noises:
            factor = torch.linalg.cholesky(kernel + level * noise)
            weights.append(torch.cholesky_solve(near[..., None], factor)[..., 0])
            explained.append((weights[-1] * near).sum(1))
    latent = torch.from_numpy(section.latent)[torch.from_numpy(index)]
    return (torch.stack(weights, 1) @ latent).float(), torch.stack(explained, 1).float()


def _matern(r: Tensor) -> Tensor:
    """The Matern-3/2 kernel at distances in units of its length."""
    return (1 + MATERN * r) * torch.exp(-MATERN * r)


class LocalNet(nn.Module):
    """From the heads at a point to the log-rates of genes, relative to the mean rates of a section.

    Parameters
    ----------
    n_heads, rank, n_genes
        H, r and G.
    config
        Width, dropout and the limit of latents.
    """

    def __init__(self, n_heads: int, rank: int, n_genes: int, config: LoFiConfig):
        super().__init__()
        self.limit = config.latent_limit
        self.gate = nn.Parameter(torch.full((n_heads, rank), 1 / n_heads))
        self.loadings = nn.Parameter(torch.zeros(n_genes, rank))
        self.intercept = nn.Parameter(torch.zeros(n_genes))
        last = nn.Linear(config.width, rank)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.correction = nn.Sequential(
            *(nn.Linear(n_heads * (rank + 2), config.width), nn.GELU(), nn.Dropout(config.dropout)),
            *(nn.Linear(config.width, config.width), nn.GELU(), nn.Dropout(config.dropout)),
            last,
        )

    def latent(self, heads: Tensor, explained: Tensor, own: Tensor | None = None) -> Tensor:
        """Latents (M, r) from heads (M, H, r + 1). If the heads `own` are given, they are summed, and `heads` give the correction."""
        summed = heads if own is None else own
        linear = (summed[..., :-1] * self.gate).sum(1)
        z = linear + self.correction(torch.cat([heads.flatten(1), explained], 1))
        return self.limit * torch.tanh(z / self.limit)

    def forward(self, heads: Tensor, explained: Tensor, own: Tensor | None = None) -> Tensor:  # -> (M, G)
        return self.intercept + self.latent(heads, explained, own) @ self.loadings.T


@dataclass(frozen=True, eq=False)
class LoFiSpots:
    """A trained local field, which predicts the expression of any section from that section's own spots.

    Parameters
    ----------
    genes
        (G,) names of the genes that can be predicted.
    encoder
        Reads counts as latents.
    members
        Networks whose log-rates are averaged.
    config
        Numbers of the field.
    n_dims
        Number of dimensions of the positions.
    """

    genes: NDArray
    encoder: Encoder
    members: tuple[LocalNet, ...]
    config: LoFiConfig
    n_dims: int = 2

    @torch.no_grad()
    def rates(self, data: SpotData, coords: NDArray | None = None, *, include_self: bool = False) -> NDArray:
        """Expected counts per unit of library size of the genes of a section.

        Parameters
        ----------
        data
            Measured spots of one section. All its genes must be among `genes`, and at least one among those of the encoder.
        coords
            (M, d) points, in the units of the spots; None takes the spots themselves.
        include_self
            Whether a spot is predicted from its own counts as well, if `coords` is None.

        Returns
        -------
        (M, C) rates, where C is the number of genes of `data`.

        Raises
        ------
        TypeError, ValueError
            If genes are unknown, positions have another number of dimensions than those of the training, or `coords` is not finite.
        """
        self._check(data)
        coords = None if coords is None else coordinates("coords", coords, (self.n_dims,))
        section = self.encoder.read(data, self.config.latent_limit)
        place = {name: i for i, name in enumerate(self.genes)}
        columns = torch.tensor([place[name] for name in data.genes])
        query = section.coords if coords is None else coords / section.pitch
        out = np.empty((len(query), len(columns)))
        for start in range(0, len(query), QUERIES):
            rows = slice(start, start + QUERIES)
            eta = self._relative(section, query[rows], coords is None, include_self)[:, columns]
            out[rows] = np.exp(eta.double().numpy() + section.log_rate)
        return out

    def _check(self, data: SpotData) -> None:
        """Require known genes, and positions of the right number of dimensions."""
        unknown = np.setdiff1d(data.genes, self.genes)
        if len(unknown):
            msg = f"`data` has {len(unknown)} genes that the model does not know, such as {str(unknown[0])!r}: take those in `genes` first"
            raise ValueError(msg)
        if data.coords.shape[1] != self.n_dims:
            msg = f"positions have {data.coords.shape[1]} columns, and the model was trained on {self.n_dims}: expected the same number"
            raise ValueError(msg)

    def _relative(self, section: Encoded, query: NDArray, at_spots: bool, include_self: bool) -> Tensor:
        """Log-rates (M, G) at points relative to the mean rates of the section; `at_spots` hides the spots at the points."""
        k, own = self.config.n_neighbours, None
        read = lambda *near: heads(section, query, *near, self.encoder, self.config)
        inputs = read(*section.neighbours(query, k, query if at_spots else None, 0.0))
        if at_spots and include_self:
            own = read(*section.neighbours(query, k, None, 0.0))[0]
        return torch.stack([net(*inputs, own) for net in self.members]).mean(0)

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to one file, which :meth:`load` reads."""
        members = {str(i): storage.weights_of(net) for i, net in enumerate(self.members)}
        encoder = {
            "share": self.encoder.share,
            "directions": self.encoder.directions,
            "variance": self.encoder.variance,
        }
        content = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "genes": list(map(str, self.genes)),
            "n_dims": self.n_dims,
            "encoder": encoder | {"genes": list(map(str, self.encoder.genes)), "precision": self.encoder.precision},
            "members": members,
        }
        storage.save(path, KIND, content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LoFiSpots:
        """The model in a file that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, it is damaged, or holds something else.
        """
        return storage.restore(path, KIND, FORMAT, cls._of)

    @classmethod
    def _of(cls, content: dict) -> LoFiSpots:
        """The model of a stored content."""
        config, genes, parts = LoFiConfig(**content["config"]), np.array(content["genes"]), dict(content["encoder"])
        encoder = Encoder(**parts | {"genes": np.array(parts["genes"])})
        members = []
        for weights in content["members"].values():
            with seeded(0):  # starting weights are drawn, and then replaced
                net = LocalNet(config.n_heads, len(encoder.variance), len(genes), config)
            storage.fill(net, weights)
            members.append(net.eval())
        arrays = (encoder.share, encoder.directions, encoder.variance)
        if not members or not all(np.isfinite(array).all() for array in arrays):
            msg = "members are missing, or numbers are not finite"
            raise ValueError(msg)
        return cls(genes, encoder, tuple(members), config, whole(2, 3)("n_dims", content["n_dims"]))
