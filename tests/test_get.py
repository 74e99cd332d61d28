import numpy as np
import pytest
from sections import fitted, stack

from neurst import get, tl


@pytest.mark.parametrize("key", ["neurtv", "other"])
def test_the_field_is_what_the_layers_hold(key):
    adata = fitted(key_added=key)
    tl.neurtv_gradient(adata, key=key)
    field, spots = get.field(adata, key), adata.obsm["spatial"]
    np.testing.assert_array_equal(field(spots).astype(np.float32), adata.layers[key])
    np.testing.assert_array_equal(field.latent(spots).astype(np.float32), adata.obsm[f"X_{key}"])
    for axis, name in enumerate("xy"):
        layer = adata.layers[f"{key}_d{name}"]
        np.testing.assert_array_equal(field.gradient(spots)[:, :, axis].astype(np.float32), layer)
    np.testing.assert_allclose(field.edge(spots), adata.obs[f"{key}_edge"], rtol=1e-12)
    assert list(field.genes) == list(adata.var_names)


def test_the_field_of_some_genes_holds_the_columns_that_were_fitted():
    adata = fitted(genes=["Layer4_01", "Layer2_01"])
    field = get.field(adata)
    np.testing.assert_array_equal(
        field(adata.obsm["spatial"]).astype(np.float32), adata[:, field.genes].layers["neurtv"]
    )


def test_predictor_is_latents_times_loadings():
    adata = fitted()
    field, spots = get.field(adata), adata.obsm["spatial"]
    eta = adata.obsm["X_neurtv"] @ adata.varm["neurtv_loadings"].T + field.intercept
    np.testing.assert_allclose(field.target_sum * np.exp(eta), field(spots), rtol=1e-4)


def test_reading_a_field_changes_nothing_and_gives_the_same_each_time():
    adata = fitted()
    part = adata.uns["neurtv"]["field"]
    before = {name: value.copy() for name, value in part["weights"].items()}
    fields = [get.field(adata) for _ in range(2)]
    np.testing.assert_array_equal(*(field(adata.obsm["spatial"] + 9.0) for field in fields))
    for name, value in before.items():
        np.testing.assert_array_equal(part["weights"][name], value)


def test_a_field_in_space_has_three_derivatives():
    adata = stack()
    tl.neurtv_fit(adata, lam=400, steps=3, progress=False)
    field, cells = get.field(adata), adata.obsm["spatial"][:7]
    assert field.n_dims == 3
    assert field.gradient(cells).shape == (7, 4, 3)
    assert field.hessian(cells).shape == (7, 4, 3, 3)
