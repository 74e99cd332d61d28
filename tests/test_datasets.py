import numpy as np
import pytest
from scipy.ndimage import minimum_filter
from scipy.spatial import cKDTree

from neurst.datasets import SyntheticTissue, synthetic_visium

PITCH = SyntheticTissue.pitch


@pytest.fixture(scope="module")
def adata():
    return synthetic_visium()


@pytest.fixture(scope="module")
def tissue(adata):
    return SyntheticTissue(**adata.uns["synthetic"])


@pytest.fixture
def points():  # (N, 2), on the tissue and off it
    return np.random.default_rng(0).uniform([-500, -500], [9300, 8200], (501, 2))


def pearson_z(counts, rate):
    """Distance, in standard deviations, of Pearson's statistic from its mean for multinomial rows."""
    n = counts.sum(1, keepdims=True)
    n_genes = rate.shape[1]
    statistic = ((counts - n * rate) ** 2 / (n * rate)).sum()
    # var of one row: 2 (G - 1) + (sum_g 1/p_g - G^2 - 2 G + 2) / n
    variance = 2 * (n_genes - 1) + ((1 / rate).sum(1) - n_genes**2 - 2 * n_genes + 2) / n[:, 0]
    return (statistic - len(n) * (n_genes - 1)) / np.sqrt(variance.sum())


def steepest_change(tissue, over):
    """Largest change of each gene's log-rate over a length in pitches, down the middle of the tissue."""
    y = np.arange(10, 48, 0.02)
    line = np.column_stack([np.full(len(y), 32.0), y]) * PITCH
    line = line[tissue.inside(line)]
    k = round(over / 0.02)
    log_rate = tissue.log_rate(line)
    return np.abs(log_rate[k:] - log_rate[:-k]).max(0)


@pytest.mark.parametrize(("n_genes", "random_state"), [(20, 0), (37, 1)])
def test_rates_sum_to_one_everywhere(points, n_genes, random_state):
    tissue = SyntheticTissue(n_genes=n_genes, random_state=random_state)
    log_rate = tissue.log_rate(points)
    assert log_rate.shape == (501, n_genes) == (501, len(set(tissue.gene_names)))
    np.testing.assert_allclose(np.exp(log_rate).sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(tissue.spot_rate(points).sum(1), 1, rtol=1e-12)


def test_spot_rate_is_the_mean_over_the_disc(adata, tissue):
    centres = adata.obsm["spatial"][100:140]
    rng = np.random.default_rng(0)
    radius, angle = np.sqrt(rng.uniform(size=4001)), rng.uniform(0, 2 * np.pi, 4001)
    disc = np.column_stack([np.cos(angle), np.sin(angle)]) * radius[:, None] * tissue.spot_diameter / 2 * PITCH
    slow = [np.exp(tissue.log_rate(centre + disc)).mean(0) for centre in centres]
    np.testing.assert_allclose(tissue.spot_rate(centres), slow, rtol=0.15)


@pytest.mark.parametrize("random_state", [0, 1, 2])
def test_counts_agree_with_the_truth_over_the_spots_and_with_nothing_else(random_state):
    adata = synthetic_visium(random_state=random_state)
    tissue = SyntheticTissue(**adata.uns["synthetic"])
    counts, coords = adata.X.toarray().astype(float), adata.obsm["spatial"]
    rate = tissue.spot_rate(coords)
    shuffled = np.random.default_rng(0).permutation(rate)
    assert abs(pearson_z(counts, rate)) < 4
    assert pearson_z(counts, np.exp(tissue.log_rate(coords))) > 4  # at the centres only
    assert pearson_z(counts, shuffled) > 100


def test_a_seed_settles_the_section_whose_shape_the_genes_do_not_change_and_the_global_state_is_untouched(adata):
    before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    again, other, more = synthetic_visium(), synthetic_visium(random_state=1), synthetic_visium(n_genes=31)
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], before)  # noqa: NPY002
    assert (adata.X != again.X).nnz == 0
    assert adata.obs.equals(again.obs)
    images = [a.uns["spatial"]["synthetic"]["images"]["hires"] for a in (adata, again, other)]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    assert adata.shape != other.shape or (adata.X != other.X).nnz > 0
    assert more.obs["layer"].tolist() == adata.obs["layer"].tolist()
    log_library = np.log(adata.X.toarray().sum(1))  # lognormal around 1500
    assert abs(np.median(log_library) - np.log(1500)) < 0.1
    assert abs(log_library.std() - 0.4) < 0.05


def test_spots_are_the_hexagonal_lattice_inside_the_outline(adata, tissue):
    coords = adata.obsm["spatial"]
    assert 1900 < len(coords) < 2100
    angle = np.arange(6) * np.pi / 3
    around = coords[:, None] + PITCH * np.column_stack([np.cos(angle), np.sin(angle)])
    distance, _ = cKDTree(coords).query(around)
    np.testing.assert_array_equal(distance < 1e-6 * PITCH, tissue.inside(around.reshape(-1, 2)).reshape(-1, 6))
    assert cKDTree(coords).query(coords, k=2)[0][:, 1].min() > 0.999 * PITCH


def test_array_position_obeys_the_parity_rule_and_gives_the_pixels(adata):
    row, col = adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()
    assert ((row + col) % 2 == 0).all()
    assert row.max() < 78
    assert col.max() < 128
    pixels = np.column_stack([col / 2, row * np.sqrt(3) / 2]) * PITCH
    np.testing.assert_allclose(adata.obsm["spatial"], pixels)
    assert adata.obs["in_tissue"].eq(1).all()


@pytest.mark.parametrize("key", ["hires", "lowres"])
def test_every_spot_lies_on_stained_tissue_in_the_picture(adata, key):
    library = adata.uns["spatial"]["synthetic"]
    image, scale = library["images"][key], library["scalefactors"][f"tissue_{key}_scalef"]
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert max(image.shape) == {"hires": 600, "lowres": 200}[key]
    x, y = (adata.obsm["spatial"] * scale).astype(int).T
    darkest = minimum_filter(image.mean(2), size=3)  # an element is glass when its centre is off the tissue
    assert darkest[y, x].max() < 0.95
    assert image[0].min() == 1  # bare glass


@pytest.mark.parametrize(
    ("pattern", "least", "most"), [("layer", 0.5, 3), ("gradient", 1e-4, 0.03), ("flat", 0, 1e-12)]
)
def test_only_layer_genes_step_over_a_tenth_of_a_pitch(adata, tissue, pattern, least, most):
    jump = steepest_change(tissue, over=0.1)[adata.var["pattern"] == pattern]
    assert np.median(jump) >= least
    assert jump.max() <= most


@pytest.mark.parametrize(("n_genes", "error"), [(19, ValueError), (30_001, ValueError), (20.5, TypeError)])
def test_a_number_of_genes_without_room_for_every_pattern_or_in_memory_is_refused(n_genes, error):
    with pytest.raises(error, match=f"`n_genes={n_genes}`: expected a whole number >= 20 and <= 30,000"):
        synthetic_visium(n_genes=n_genes)
