"""A Visium-like section drawn from a continuous expression field that is known everywhere."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import expit

from neurst.core.arguments import SEED, check_fields, checked, whole

# Shape of the section, in pitches; y points down.
SLIDE = np.array([64.0, 56.0])  # width and height of the picture
CENTRE = SLIDE / 2
OUTLINE_AXES = np.array([25.2, 21.9])  # an area of about 2,000 spots, whatever the phases of the lobes
OUTLINE_LOBES = np.array([2, 3, 5])
OUTLINE_HEIGHTS = np.array([0.05, 0.10, 0.03])  # relative to the radius
ARC_CENTRE = CENTRE + [0.0, 14.0]
ARC_RADII = np.array([31.0, 25.0, 19.0, 12.0])  # the four layer boundaries, from the outside in
NUCLEUS_RADIUS = 22.0  # from ARC_CENTRE: the middle of Layer3
NUCLEUS_AXES = np.array([1.0, 0.6])  # semi-axes, both above 1/sqrt(3): one spot centre or more always falls inside
SPOT_NODES = 19  # quadrature points on the disc of a spot

# Regions, outside in, with their relative library size and their nuclei per picture element.
REGIONS = np.array(["Layer1", "Layer2", "Layer3", "Layer4", "Layer5", "Nucleus"])
LIBRARY_FACTOR = np.array([0.9, 1.1, 1.05, 1.1, 0.85, 1.0])
NUCLEI = np.array([0.25, 1.1, 0.6, 1.4, 0.3, 2.6])
N_SMOOTH = 4  # gradients
STAINS = np.array([[0.65, 0.70, 0.29], [0.10, 0.80, 0.30]])  # optical density of haematoxylin and eosin in RGB
HIRES_WIDTH = 600  # picture elements; the low-resolution picture is a third of it
# every pattern needs a gene of its own, and the rates of all genes are held at once
N_GENES = whole(20, 30_000)


@dataclass(frozen=True)
class SyntheticTissue:
    r"""The true field: log expected fraction of the library, for each gene at any point.

    .. math:: \log r_g(x) = \log \pi_g + \sum_k z_k(x) V_{kg} - \log Z_{c(g)}(x)

    All genes share ten programmes :math:`z_k`: the memberships of five layers and a small nucleus (they sum to one and
    step like ``expit(distance / edge_width)``) and four smooth gradients with values in [-1, 1]. :math:`Z_c` normalises
    each of three classes of genes (layer and nucleus; gradient; flat) on its own, so that a class has the same share of the
    library everywhere. So all rates sum to one, yet flat genes are exactly flat and gradient genes have no step.

    Coordinates are full-resolution pixels; one pitch, 100 um on the slide, is `pitch` pixels. The field is defined
    outside the tissue as well; `inside` says where the tissue is.

    Parameters
    ----------
    n_genes
        Number of genes, 20 to 30,000: about 57 % layer, 25 % gradient, 15 % flat and 3 % nucleus genes.
    random_state
        Seed of the shape, the mean levels and the loadings. The shape does not depend on `n_genes`.

    Examples
    --------
    >>> tissue = SyntheticTissue(n_genes=50)
    >>> tissue.log_rate(np.array([[4384.0, 3836.0]])).shape
    (1, 50)
    """

    n_genes: int = 200
    random_state: int = 0
    pitch: ClassVar[float] = 137.0  # pixels between the centres of neighbouring spots
    spot_diameter: ClassVar[float] = 0.55  # in pitches
    edge_width: ClassVar[float] = 0.02  # in pitches

    def __post_init__(self):
        check_fields(self, n_genes=N_GENES, random_state=SEED)

    @cached_property
    def origin(self) -> np.ndarray:  # (G,) str
        """Pattern of each gene: the name of a region, ``Gradient`` or ``Flat``."""
        nucleus, flat, gradient = (max(1, round(share * self.n_genes)) for share in (0.03, 0.15, 0.25))
        layers = [(self.n_genes - nucleus - flat - gradient + i) // 5 for i in range(5)]
        return np.repeat([*REGIONS, "Gradient", "Flat"], [*layers, nucleus, gradient, flat])

    @cached_property
    def gene_names(self) -> list[str]:  # (G,)
        """Pattern and running number of each gene, such as ``Layer2_03``."""
        number = pd.Series(self.origin).groupby(self.origin).cumcount() + 1
        return [f"{name}_{i:02d}" for name, i in zip(self.origin, number, strict=True)]

    def inside(self, coords: np.ndarray) -> np.ndarray:  # (N, 2) -> (N,) bool
        """Whether points are in the tissue."""
        x, y = ((coords / self.pitch - CENTRE) / OUTLINE_AXES).T
        waves = np.cos(np.arctan2(y, x)[:, None] * OUTLINE_LOBES + self._shape["outline"])
        return np.hypot(x, y) < 1 + waves @ OUTLINE_HEIGHTS

    def layer(self, coords: np.ndarray) -> np.ndarray:  # (N, 2) -> (N,) str
        """Name of the layer, or ``Nucleus``, that holds each point."""
        return REGIONS[self._regions(coords / self.pitch).argmax(1)]

    def log_rate(self, coords: np.ndarray) -> np.ndarray:  # (N, 2) -> (N, G)
        """Log expected fraction of the library at each point, natural logarithm."""
        points = coords / self.pitch
        programmes = np.concatenate([self._regions(points), self._gradients(points)], axis=1)
        log_level, loadings = self._genes
        log_rate = log_level + programmes @ loadings
        for genes in (np.isin(self.origin, REGIONS), self.origin == "Gradient", self.origin == "Flat"):
            share = np.exp(log_level[genes]).sum()
            log_rate[:, genes] += np.log(share / np.exp(log_rate[:, genes]).sum(1, keepdims=True))
        return log_rate

    def spot_rate(self, coords: np.ndarray) -> np.ndarray:  # (N, 2) -> (N, G)
        """Mean rate, not its logarithm, over the disc of a spot at each point."""
        i = np.arange(SPOT_NODES)
        # Vogel's sunflower: every node represents the same area of the disc
        radius, angle = np.sqrt((i + 0.5) / SPOT_NODES), i * np.pi * (3 - np.sqrt(5))
        nodes = self.pitch * self.spot_diameter / 2 * radius * np.array([np.cos(angle), np.sin(angle)])
        return sum(np.exp(self.log_rate(coords + node)) for node in nodes.T) / SPOT_NODES

    @cached_property
    def _shape(self) -> dict[str, np.ndarray | float]:
        # shape, genes, counts and picture have independent random streams, 0 to 3
        rng = np.random.default_rng([0, self.random_state])
        at = rng.uniform(-0.7, 0.7)
        return {
            "outline": rng.uniform(0, 2 * np.pi, 3),
            "folds": rng.uniform(0, 2 * np.pi),
            "wave": rng.uniform(0, 2 * np.pi, 2),  # direction and phase
            "nucleus": ARC_CENTRE + NUCLEUS_RADIUS * np.array([np.sin(at), -np.cos(at)]),
            "turn": rng.uniform(0, np.pi),
            "bump": CENTRE + rng.uniform(-12, 12, 2),
        }

    @cached_property
    def _genes(self) -> tuple[np.ndarray, np.ndarray]:  # log levels (G,), loadings (10, G)
        rng = np.random.default_rng([1, self.random_state])
        n = self.n_genes
        log_level = rng.normal(0, 1, n)
        # log rates of a marker are raised by 0.8-2 in its own region, by up to half of that in adjacent layers (not the nucleus)
        own, adjacent = REGIONS[:, None] == self.origin, np.diag([1, 1, 1, 1, 0], 1)
        regions = rng.uniform(0.8, 2, n) * (own + (adjacent + adjacent.T) @ own * rng.uniform(0, 0.5, own.shape))
        # markers follow the gradients weakly; a gradient gene follows one of them with a loading of 0.3-1, of either sign
        main = (np.arange(n) % N_SMOOTH == np.arange(N_SMOOTH)[:, None]) * (self.origin == "Gradient")
        gradients = rng.normal(0, 0.12, main.shape) + main * rng.uniform(0.3, 1, n) * rng.choice([-1, 1], n)
        gradients *= self.origin != "Flat"
        return log_level - np.log(np.exp(log_level).sum()), np.concatenate([regions, gradients])

    def _regions(self, points: np.ndarray) -> np.ndarray:  # (N, 2) in pitches -> (N, 6), rows sum to one
        radius = np.linalg.norm(points - ARC_CENTRE, axis=1) + np.sin(0.35 * points[:, 0] + self._shape["folds"])
        outer = expit((radius[:, None] - ARC_RADII) / self.edge_width)
        layers = np.diff(outer, axis=1, prepend=0, append=1)
        c, s = np.cos(self._shape["turn"]), np.sin(self._shape["turn"])
        ellipse = np.linalg.norm((points - self._shape["nucleus"]) @ np.array([[c, -s], [s, c]]) / NUCLEUS_AXES, axis=1)
        nucleus = expit((1 - ellipse[:, None]) * NUCLEUS_AXES.min() / self.edge_width)
        return np.concatenate([layers * (1 - nucleus), nucleus], axis=1)

    def _gradients(self, points: np.ndarray) -> np.ndarray:  # (N, 2) in pitches -> (N, 4)
        planes = (points - CENTRE) / CENTRE
        direction, phase = self._shape["wave"]
        wave = np.sin(2 * np.pi / 30 * points @ [np.cos(direction), np.sin(direction)] + phase)
        bump = 2 * np.exp(-(((points - self._shape["bump"]) / 7) ** 2).sum(1) / 2) - 1
        return np.column_stack([planes, wave, bump])


@checked(n_genes=N_GENES, random_state=SEED)
def synthetic_visium(*, n_genes: int = 200, random_state: int = 0) -> AnnData:
    r"""About 2,000 hexagonal spots of integer counts drawn from a `SyntheticTissue`.

    .. math:: X_{ig} \sim \mathrm{Poisson}\Big(L_i \frac{1}{|D|} \int_D r_g(x_i + u)\,du\Big),
        \quad L_i = 1500\, f_{\mathrm{layer}(i)}\, e^{0.4 \varepsilon_i}, \quad \varepsilon_i \sim N(0, 1)

    with the disc D of a spot (55 um on a pitch of 100 um) and layer factors f between 0.85 and 1.1.

    Parameters
    ----------
    n_genes
        Number of genes, 20 to 30,000.
    random_state
        Seed of every draw: the same seed on the same machine gives the same numbers.

    Returns
    -------
    `X` counts, CSR float32. `obs`: ``layer`` (at the spot's centre), ``array_row``, ``array_col``, ``in_tissue``.
    `var["pattern"]`: ``layer``, ``nucleus``, ``gradient`` or ``flat``. `obsm["spatial"]`: x and y, float64, pixels of
    the full-resolution picture. `uns["spatial"]`: pictures and scale factors, as Space Ranger has them.
    `uns["synthetic"]`: the parameters of the tissue.

    Raises
    ------
    TypeError, ValueError
        If an argument is not valid.

    Examples
    --------
    >>> adata = synthetic_visium()
    >>> truth = SyntheticTissue(**adata.uns["synthetic"]).log_rate(adata.obsm["spatial"])
    """
    tissue = SyntheticTissue(n_genes=n_genes, random_state=random_state)
    rng = np.random.default_rng([2, random_state])
    grid, coords = _lattice(tissue)
    layer = pd.Categorical(tissue.layer(coords), categories=list(REGIONS))
    library = 1500 * LIBRARY_FACTOR[layer.codes] * rng.lognormal(0, 0.4, len(coords))
    counts = rng.poisson(library[:, None] * tissue.spot_rate(coords))
    barcodes = [np.base_repr(code, 4).zfill(16) for code in rng.choice(4**16, len(coords), replace=False)]
    names = [f"{code.translate(str.maketrans('0123', 'ACGT'))}-1" for code in barcodes]
    obs = {"in_tissue": 1, "array_row": grid[:, 0], "array_col": grid[:, 1], "layer": layer}
    pattern = pd.Categorical(pd.Series(tissue.origin).str.rstrip("12345").str.lower())
    return AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(obs, index=names),
        var=pd.DataFrame({"pattern": pattern}, index=tissue.gene_names),
        obsm={"spatial": coords},
        uns={"synthetic": asdict(tissue), "spatial": {"synthetic": _picture(tissue)}},
    )


def _lattice(tissue: SyntheticTissue) -> tuple[np.ndarray, np.ndarray]:  # row and column (N, 2), pixels (N, 2)
    step = np.array([np.sqrt(3) / 2, 0.5])  # in pitches, per array_row and array_col
    grid = np.argwhere(np.indices((SLIDE[::-1] / step).astype(int)).sum(0) % 2 == 0)
    coords = np.ascontiguousarray((grid * step)[:, ::-1]) * tissue.pitch
    keep = tissue.inside(coords)
    return grid[keep], coords[keep]


def _picture(tissue: SyntheticTissue) -> dict:
    """Pictures and scale factors of one library: stained nuclei by Beer and Lambert's law."""
    rng = np.random.default_rng([3, tissue.random_state])
    scale = HIRES_WIDTH / (SLIDE[0] * tissue.pitch)
    width, height = (SLIDE * tissue.pitch * scale).round().astype(int)
    y, x = np.indices((height, width)).reshape(2, -1)
    points = (np.column_stack([x, y]) + 0.5) / scale
    nuclei = rng.poisson(tissue._regions(points / tissue.pitch) @ NUCLEI)
    eosin = 0.22 + 0.05 * tissue._gradients(points / tissue.pitch)[:, 2] + rng.normal(0, 0.02, len(points))
    density = np.column_stack([0.08 + 0.22 * nuclei, eosin]) * tissue.inside(points)[:, None]
    hires = np.exp(-np.maximum(density, 0) @ STAINS).reshape(height, width, 3).astype(np.float32)
    lowres = hires.reshape(height // 3, 3, width // 3, 3, 3).mean((1, 3))
    diameter = tissue.spot_diameter * tissue.pitch
    return {
        "images": {"hires": hires, "lowres": lowres},
        "scalefactors": {
            "tissue_hires_scalef": scale,
            "tissue_lowres_scalef": scale / 3,
            "spot_diameter_fullres": diameter,
            "fiducial_diameter_fullres": diameter * 1.6,
        },
        "metadata": {"chemistry_description": "synthetic"},
    }
