import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from draws import NETWORKS, normal, uniform
from torch import nn

from neurst.core import field as field_module
from neurst.core import storage
from neurst.core.field import MODULES, FittedField, load_field, network_from_dict
from neurst.core.heads import Affine, Head, Identity, Loadings
from neurst.core.likelihood import Gaussian, NegativeBinomial, Poisson, RootGaussian, Truncated
from neurst.core.nets import NETWORKS as registry
from neurst.core.nets import Fourier, LowRank, Siren, Spline
from neurst.core.samples import Box
from neurst.core.table import multi_indices

C = 3
SHIFT, GAIN = normal(C, seed=1), uniform(C, seed=2, low=0.5, high=2.0)
WEIGHT = normal(C, 2, seed=3)
# head -> its latent channels
HEADS = {
    "identity": (Identity(), 3),
    "affine": (Affine(SHIFT, GAIN), 3),
    "affine, one unit": (Affine(SHIFT[0], GAIN[0]), 3),
    "loadings": (Loadings(WEIGHT, SHIFT), 2),
    "loadings, gain": (Loadings(WEIGHT, SHIFT, GAIN), 2),
}
LIKELIHOODS = {
    "gaussian": Gaussian(torch.tensor([0.3, 1.0, 7.0])),
    "root": RootGaussian(),
    "truncated": Truncated(0.8),
    "poisson": Poisson(),
    "negative binomial": NegativeBinomial(torch.tensor([0.7, 3.0, 20.0])),
}


def make(d=2, head="identity", likelihood="gaussian", network="siren", dtype=torch.float64):
    """A field that was not fitted: random weights, a box of 60 units far from the origin."""
    (head, n_latent), spec = HEADS[head], NETWORKS[network]
    net = spec.build(d, n_latent + 1, torch.Generator().manual_seed(0))  # one more output, as of a second field
    with torch.no_grad():
        for i, weights in enumerate(net.parameters()):
            weights += 0.2 * normal(*weights.shape, seed=i)
    parts = copy.deepcopy(nn.ModuleList([net, head, LIKELIHOODS[likelihood]]))
    net, head, likelihood = parts.requires_grad_(False).to(dtype)
    center = torch.tensor([5000.0, -30.0, 0.1][:d], dtype=torch.float64)
    history = {"step": [0, 7], "objective": [2.5, 1.0]}
    return FittedField(Box(center, 30.0), spec, net, head, likelihood, n_latent=n_latent, lam=0.1, history=history)


def places(field, n=7, seed=0):
    """Coordinates in the units of a field."""
    return field.box.from_unit(uniform(n, field.n_dims, seed=seed, low=-0.9, high=0.9))


LINKED = [("affine", "gaussian"), ("identity", "poisson"), ("loadings, gain", "negative binomial")]


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(("head", "likelihood"), LINKED)
def test_derivatives_are_those_of_the_values_in_the_units_of_the_coordinates(head, likelihood, d):
    field = make(d, head, likelihood)
    x, h = places(field), 1e-4 * field.box.scale
    steps = h * torch.eye(d).double()
    central = lambda read: torch.stack([(read(x + e) - read(x - e)) / (2 * h) for e in steps], -1)
    first, second = field.jacobian(x), field.hessian(x)
    assert first.shape == (7, C, d)
    assert second.shape == (7, C, d, d)
    for found, expected in [(first, central(field)), (second, central(field.jacobian))]:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    every, alphas = field.partials(x, 3)
    assert alphas == multi_indices(d, 3)
    third = central(field.hessian)  # (N, C, d, d, d)
    for values, alpha in zip(every.unbind(-1), alphas, strict=True):
        axes = tuple(i for i, times in enumerate(alpha) for _ in range(times))
        expected = (field(x), first, second, third)[len(axes)][(..., *axes)]
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_another_head_is_read_from_the_same_network():
    field = make(2, "identity")
    turned = field.with_head(Affine(SHIFT, GAIN))
    x = places(field)
    torch.testing.assert_close(turned(x), SHIFT + GAIN * field(x))
    torch.testing.assert_close(turned.jacobian(x), GAIN[:, None] * field.jacobian(x))
    torch.testing.assert_close(field(x), field.latent(x))  # the field itself is as it was


READS = {
    "values": lambda field, x: field(x),
    "latent": lambda field, x: field.latent(x),
    "jacobian": lambda field, x: field.jacobian(x),
    "hessian": lambda field, x: field.hessian(x),
    "partials": lambda field, x: field.partials(x, 2)[0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", READS)
def test_arrays_and_lists_give_float64_arrays_and_tensors_the_type_of_the_weights(name, dtype):
    field, read = make(dtype=dtype), READS[name]
    x = places(field).numpy()
    found = read(field, x)
    assert type(found) is np.ndarray
    assert found.dtype == np.float64
    for same in (x.tolist(), np.asfortranarray(x), x[::-1].copy()[::-1]):
        np.testing.assert_array_equal(read(field, same), found)
    tensor = read(field, torch.from_numpy(x).requires_grad_())
    assert (tensor.dtype, tensor.requires_grad) == (dtype, False)
    np.testing.assert_array_equal(tensor.double(), found)
    assert read(field, x[:0]).shape == (0, *found.shape[1:])


@pytest.mark.parametrize("name", READS)
def test_the_size_of_a_chunk_does_not_matter(name, monkeypatch):
    field = make(3)
    x = places(field, 50)
    whole = READS[name](field, x)
    for limit, size in [("POINTS_AT_ONCE", 7), ("NUMBERS_AT_ONCE", 100), ("NUMBERS_AT_ONCE", 1)]:
        with monkeypatch.context() as patch:
            patch.setattr(field_module, limit, size)
            torch.testing.assert_close(READS[name](field, x), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("coords", "message"), [
    (torch.zeros(4, 3), r"`coords` has shape \(4, 3\): expected \(N, 2\)"),
    (torch.zeros(2), r"`coords` has shape \(2,\): expected \(N, 2\)"),
    ([[0.0, np.nan]], r"`coords` is not finite at 1 of 1 points"),
])  # fmt: skip
def test_coordinates_of_another_shape_are_refused(coords, message):
    with pytest.raises(ValueError, match=message):
        make()(coords)


# ---- stored fields


def same(a, b):
    """Whether two fields hold the same numbers, bit by bit."""
    x = places(a, 20)
    reads = all(torch.equal(read(a, x), read(b, x)) for read in READS.values())
    numbers = lambda field: (field.network, field.history, field.n_latent, field.lam, field.box.scale)
    return reads and numbers(a) == numbers(b)


# every head, every likelihood and every network, each in float32 or float64
STORED = [
    *((head, "gaussian", "siren", torch.float64) for head in HEADS),
    *(("loadings", likelihood, "siren", torch.float32) for likelihood in LIKELIHOODS),
    *(("affine", "poisson", network, torch.float32) for network in NETWORKS),
    ("identity", "gaussian", "spline", torch.float64),
]


def test_every_module_that_can_be_stored_is_tested_here():
    assert {type(head) for head, _ in HEADS.values()} | {type(part) for part in LIKELIHOODS.values()} == set(MODULES)


@pytest.mark.parametrize(("head", "likelihood", "network", "dtype"), STORED)
def test_a_stored_field_comes_back_to_the_same_numbers(head, likelihood, network, dtype):
    field = make(2, head, likelihood, network, dtype)
    again = FittedField.from_dict(field.to_dict())
    assert same(again, field)
    assert not again.net.training
    assert not any(p.requires_grad for p in (*again.net.parameters(), *again.head.parameters()))
    for a, b in [(again.head, field.head), (again.likelihood, field.likelihood)]:
        assert type(a) is type(b)
        for name, value in a.arguments().items():
            torch.testing.assert_close(value.double().squeeze(), b.arguments()[name].double(), rtol=1e-6, atol=0)


def test_a_saved_field_is_read_in_another_process_to_the_same_numbers(tmp_path):
    for i, (head, likelihood, network, dtype) in enumerate(STORED):
        field = make(2, head, likelihood, network, dtype)
        x = places(field).numpy()
        field.save(tmp_path / f"{i}.safetensors")
        np.savez(tmp_path / f"{i}.npz", x=x, **{name: read(field, x) for name, read in READS.items()})
        assert same(load_field(tmp_path / f"{i}.safetensors"), field)
    script = """
import sys, pathlib, numpy as np
from neurst.core.field import load_field
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.npz")):
    field, expected = load_field(file.with_suffix(".safetensors")), np.load(file)
    x = expected["x"]
    found = {"values": field(x), "latent": field.latent(x), "jacobian": field.jacobian(x), "hessian": field.hessian(x)}
    found["partials"] = field.partials(x, 2)[0]
    for name, values in found.items():
        assert values.tobytes() == expected[name].tobytes(), (file, name)
    print(file)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == len(STORED)


def changed(**parts):
    """The stored form of a field with other entries; those that are None are left out."""
    stored = make(2, "loadings").to_dict() | parts
    return {name: part for name, part in stored.items() if part is not None}


BIAS = "0-linear-bias"
DAMAGED = {
    "more outputs": ({"n_outputs": 10**9}, "weights are stored, but Siren.* and 1000000000 outputs has"),
    "another network": ({"network": {"name": "nothing"}}, "the network 'nothing' is unknown"),
    "NaN": ({"weights": changed()["weights"] | {BIAS: np.full(16, np.nan)}}, "0.linear.bias is not finite"),
    "another shape": ({"weights": changed()["weights"] | {BIAS: np.zeros((2, 8))}}, "size mismatch for 0.linear.bias"),
    "17 dimensions": ({"box_center": np.zeros(17)}, "box_center has 17 entries, expected 1 to 16"),
    "too many latent channels": ({"n_latent": 4}, "n_latent is 4, expected 1 to 3"),
    "a head for other latent channels": ({"n_latent": 3}, ""),
    "another head": ({"head": {"class": "eval"}}, "KeyError: 'eval'"),
    "no loadings": ({"head": {"class": "Loadings"}}, "missing 2 required positional arguments"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_field_is_refused_by_its_path_and_the_reason(tmp_path, parts, message):
    storage.save(tmp_path / "a.safetensors", "fitted", changed(**parts))
    words = rf"`path='.*a.safetensors'` is damaged \(.*{message}.*\): save the field again"
    with pytest.raises(ValueError, match=words):
        load_field(tmp_path / "a.safetensors")


HUGE = [
    (Siren(width=10**6), 2),
    (Siren(width=10, depth=10**6), 2),
    (Fourier(n_features=10**8), 2),
    (LowRank(rank=10**4), 3),
]
HUGE += [
    (LowRank(width=10**6), 1),
    (Spline(cells=10**5), 2),
    (Spline(cells=(2, 10**9)), 3),
    (Siren(width=2, depth=1), 2),
]


@pytest.mark.parametrize(("spec", "d"), HUGE, ids=repr)
def test_a_network_that_asks_for_more_or_fewer_weights_than_are_stored_is_not_built(spec, d, monkeypatch):
    monkeypatch.setattr(type(spec), "build", lambda *_: pytest.fail("the network was built"))
    with pytest.raises(ValueError, match=r"^100 weights are stored, but .* has (9|[\d,]{8,})$"):
        network_from_dict(spec, d, 1, {"a": np.zeros((10, 10), np.float32)})


class Own(Siren):
    """A network with a whole number among its stored weights."""

    def n_weights(self, n_in, n_out):
        return super().n_weights(n_in, n_out) + 1

    def build(self, n_in, n_out, generator):
        net = super().build(n_in, n_out, generator)
        net.register_buffer("count", torch.tensor([7]))
        return net


def test_whole_numbers_among_the_weights_do_not_change_the_type_of_a_network(monkeypatch):
    monkeypatch.setitem(registry, "own", Own)
    net = Own().build(2, 4, torch.Generator()).requires_grad_(False)
    field = dataclasses.replace(make(dtype=torch.float32), network=Own(), net=net)
    assert same(FittedField.from_dict(field.to_dict()), field)


def test_a_head_of_ones_own_cannot_be_stored():
    class OwnHead(Head):
        def forward(self, z, channels=None):
            return z

    field = dataclasses.replace(make(), head=OwnHead())
    with pytest.raises(
        TypeError, match=r"OwnHead cannot be stored: expected one of \['Affine', 'Gaussian', 'Identity'"
    ):
        field.to_dict()
