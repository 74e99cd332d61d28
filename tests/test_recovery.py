import numpy as np
import pytest
from scipy.stats import norm

from neurst import get
from neurst.datasets import SyntheticTissue, synthetic_visium
from neurst.spatial.evaluate.baselines import kernel_cv, nearest_cv
from neurst.spatial.evaluate.splits import split
from neurst.tl import neurtv_fit, neurtv_superres


@pytest.fixture(scope="module")
def section():
    """A synthetic section, a lattice three times as dense, and the true log-rates there."""
    adata = synthetic_visium()
    neurtv_fit(adata, progress=False)
    dense = neurtv_superres(adata, factor=3)
    return adata, dense, SyntheticTissue(**adata.uns["synthetic"]).log_rate(dense.obsm["spatial"])


def rmse(a, b):
    return np.sqrt(np.mean((a - b) ** 2))


def test_log_rates_between_the_spots_are_30_percent_nearer_to_the_truth_than_those_of_the_baselines(section):
    adata, dense, truth = section
    known = adata.obsm["spatial"], adata.X, np.asarray(adata.X.sum(1)).ravel(), dense.obsm["spatial"]
    best = min(rmse(np.log(baseline(*known)), truth) for baseline in (nearest_cv, kernel_cv))
    ours = rmse(np.log(dense.X / dense.uns["neurtv"]["query"]["target_sum"]), truth)
    print(f"RMSE of log-rates: {ours:.4f}, best baseline {best:.4f}")
    assert ours <= 0.7 * best


def test_genes_without_a_pattern_are_known_by_their_score(section):
    adata, _, _ = section
    score, pattern = adata.var["neurtv_deviance_explained"], adata.var["pattern"]
    assert score[pattern == "flat"].max() < 0.02
    assert score[pattern == "layer"].median() > 0.4


def test_the_boundary_map_is_strong_where_layers_meet(section):
    adata, dense, _ = section
    tissue, points = SyntheticTissue(**adata.uns["synthetic"]), dense.obsm["spatial"]
    here, angle = tissue.layer(points), np.linspace(0, 2 * np.pi, 13)[:-1]

    def meets_another_layer(distance):  # in pitches
        ring = tissue.pitch * distance * np.column_stack([np.cos(angle), np.sin(angle)])
        return np.any([tissue.layer(points + step) != here for step in ring], axis=0)

    boundary, inside = get.field(dense).boundary(points), tissue.inside(points)
    at, away = inside & meets_another_layer(0.5), inside & ~meets_another_layer(2)
    assert np.median(boundary[at]) > 5 * np.median(boundary[away])


def test_log_rates_at_hidden_spots_lie_in_their_intervals_as_often_as_they_say():
    adata = synthetic_visium(n_genes=60)
    train, test = split(adata.obsm["spatial"], "random", random_state=1)
    tissue, known = SyntheticTissue(**adata.uns["synthetic"]), adata[train].copy()
    neurtv_fit(known, progress=False)
    field, spots = get.field(known), adata.obsm["spatial"][test]
    error = np.log(field(spots) / field.target_sum) - np.log(tissue.spot_rate(spots))
    z = np.abs(error) / np.sqrt(field.predictor_variance(spots))
    found = {level: float((z < norm.ppf((1 + level) / 2)).mean()) for level in (0.5, 0.8, 0.95)}
    print(f"coverage of the nominal intervals: {found}")
    for level, share in found.items():
        assert share == pytest.approx(level, abs=0.07)
