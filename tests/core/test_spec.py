import json
from dataclasses import dataclass

import numpy as np
import pytest
from torch import nn

from neurst.core import penalty
from neurst.core.nets import NETWORKS, Bumps, Cosine, Fourier, LowRank, Network, Siren, Spline
from neurst.core.penalty import PENALTIES, TGV, MixedTV, SpaceVariantTV, WeightedTV

# every registered specification, with other numbers than the defaults
SPECS = {
    "network": [
        Siren(width=7, depth=2, omega=3.5),
        Fourier(width=7, depth=1, n_features=3, scale=0.5),
        LowRank(rank=3, width=5, omega=1.25),
        Spline(cells=(2, 5)),
        Spline(cells=(3,), sides=(1.0, 0.25)),
        Cosine(waves=5, sides=(0.5, 1.0), margin=0.3),
        Bumps(width=0.25),
    ],
    "penalty": [
        *(
            penalty.AnisotropicTV(),
            penalty.IsotropicTV(),
            penalty.VectorialTV(),
            penalty.NuclearTV(),
            penalty.HessianTV(),
        ),
        *(penalty.HigherOrderTV(order=3), MixedTV(first_order=0.25), TGV(a1=2.0, a0=0.0)),
        *(
            SpaceVariantTV(neighbours=5, window=0.5, shared=True),
            penalty.EdgeWeightedTV(neighbours=5, window=0.0),
            penalty.PredictedTGV(nodes=20, noise=0.1),
        ),
    ],
}
REGISTRIES = {"network": NETWORKS, "penalty": PENALTIES}
ALL = [(REGISTRIES[kind], spec) for kind, specs in SPECS.items() for spec in specs]


@pytest.mark.parametrize("kind", SPECS)
def test_every_registered_specification_is_tested_here(kind):
    assert {type(spec) for spec in SPECS[kind]} == set(REGISTRIES[kind].values())


@pytest.mark.parametrize(("registry", "spec"), ALL)
def test_a_specification_comes_back_from_plain_values(registry, spec):
    stored = registry.to_dict(spec)
    assert registry.from_dict(stored) == spec
    assert json.loads(json.dumps(stored)) == stored  # no tuples: a file gives back lists
    assert registry[stored["name"]] is type(spec)
    # a file of arrays, as HDF5 is, gives back NumPy's types
    as_arrays = {key: np.asarray(value) if key != "name" else np.str_(value) for key, value in stored.items()}
    again = registry.from_dict(as_arrays)
    assert again == spec
    assert [type(value) for value in vars(again).values()] == [type(value) for value in vars(spec).values()]


@pytest.mark.parametrize(("found", "expected"), [
    (Siren(width=np.int64(16), omega=np.float32(2)), Siren(width=16, omega=2.0)),
    (Spline(cells=np.array([4, 8]), sides=[1, np.float32(0.5)]), Spline((4, 8), (1.0, 0.5))),
    (SpaceVariantTV(neighbours=np.uint8(3), shared=np.True_), SpaceVariantTV(neighbours=3, shared=True)),
])  # fmt: skip
def test_numpy_numbers_are_stored_as_plain_ones(found, expected):
    assert (found, repr(found), hash(found)) == (expected, repr(expected), hash(expected))


@pytest.mark.parametrize("kind", SPECS)
def test_a_name_is_the_default_specification_and_a_specification_is_itself(kind):
    registry = REGISTRIES[kind]
    for name in registry:
        assert registry.get_spec(name) == registry[name]()
        assert registry.name_of(registry.get_spec(name)) == name
    assert registry.get_spec(SPECS[kind][0]) is SPECS[kind][0]


UNKNOWN = [
    (
        NETWORKS,
        "mlp",
        ValueError,
        r"`network='mlp'`: expected 'bumps', 'cosine', 'fourier', .* or a specif.* `neurst.core.nets.Siren\(",
    ),
    (PENALTIES, "tv", ValueError, r"`penalty='tv'`: expected 'anisotropic', .* `neurst.core.penalty.TGV\("),
    (NETWORKS, Siren, TypeError, "`network=<class .*Siren'>`: expected 'bumps', 'cosine', 'fourier'"),
    (NETWORKS, TGV(), TypeError, r"`network=TGV\(a1=1.0, a0=0.2\)`: expected 'bumps', 'cosine', 'fourier'"),
]


@pytest.mark.parametrize(("registry", "value", "error", "message"), UNKNOWN)
def test_an_unknown_specification_is_told_the_known_ones(registry, value, error, message):
    with pytest.raises(error, match=message):
        registry.get_spec(value)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: Siren(width=0), ValueError, "`Siren.width=0`: expected a whole number >= 1"),
    (lambda: LowRank(rank=2.5), TypeError, "`LowRank.rank=2.5`"),
    (lambda: Spline(cells=()), ValueError, r"`Spline.cells=\(\)`: expected .* a list of 1 or more"),
    (lambda: Spline(sides=(1.0, 0.0)), ValueError, r"`Spline.sides=\(1.0, 0.0\)`"),
    (lambda: Cosine(waves=0), ValueError, "`Cosine.waves=0`: expected a whole number >= 1"),
    (lambda: Cosine(margin=-0.1), ValueError, "`Cosine.margin=-0.1`: expected a finite number >= 0"),
    (lambda: SpaceVariantTV(shared=1), TypeError, "`SpaceVariantTV.shared=1`: expected True or False"),
    (lambda: TGV(a0=-0.1), ValueError, "`TGV.a0=-0.1`: expected a finite number >= 0"),
])  # fmt: skip
def test_a_specification_names_the_number_it_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- classes of the user's own


@dataclass(frozen=True)
class Own(Network):
    sizes: tuple = (1,)
    text: str = "a"

    def n_weights(self, n_in, n_out):
        return (n_in + 1) * n_out

    def build(self, n_in, n_out, generator):
        return nn.Linear(n_in, n_out)


class Derived(Siren):
    """A subclass without a name."""


@dataclass(frozen=True)
class Named(Network):
    """A specification with a number called as its name is stored."""

    name: int = 3
    n_weights, build = Own.n_weights, Own.build


@dataclass
class Loose(Network):
    """A dataclass that is not frozen."""

    n_weights, build = Own.n_weights, Own.build


@pytest.fixture
def own():
    """A registered class of one's own."""
    yield NETWORKS.register("own")(Own)
    del NETWORKS["own"]


def test_a_registered_class_of_ones_own_is_named_stored_and_read_back(own):
    assert NETWORKS.register("own")(Own) is Own  # twice, as when a cell of a notebook is run again
    assert NETWORKS.get_spec("own") == Own()
    spec = Own(sizes=(2.5, 1.0), text="ä")
    stored = NETWORKS.to_dict(spec)
    assert stored == {"name": "own", "sizes": [2.5, 1.0], "text": "ä"}
    assert NETWORKS.from_dict(json.loads(json.dumps(stored))) == spec
    assert NETWORKS.from_dict(NETWORKS.to_dict(Own(sizes=()))) == Own(sizes=())  # where the default is not empty


NAMELESS = [
    (NETWORKS, Own(), r"cannot be stored, as Own has no name: .* `@neurst.core.nets.NETWORKS.register\(\"a_name\"\)`"),
    (NETWORKS, Derived(width=5), "Derived has no name: .* a subclass needs a name of its own"),
    (PENALTIES, WeightedTV(np.ones(3)), "WeightedTV has no name: .*neurst.core.penalty.PENALTIES.register"),
]


@pytest.mark.parametrize(("registry", "spec", "message"), NAMELESS)
def test_a_class_without_a_name_cannot_be_stored(registry, spec, message):
    assert registry.name_of(spec) is None
    with pytest.raises(TypeError, match=message):
        registry.to_dict(spec)


@pytest.mark.parametrize("value", [None, ((1, 2),), np.int64(3), [1]], ids=repr)
def test_a_specification_that_holds_more_than_numbers_and_texts_cannot_be_stored(own, value):
    with pytest.raises(TypeError, match="cannot be stored: its 'sizes' is .* expected a number, a text, or a tuple of"):
        NETWORKS.to_dict(Own(sizes=value))


@pytest.mark.parametrize(("stored", "error", "message"), [
    ({"name": "own", "sizes": [1]}, ValueError, "the network 'own' is unknown here: register its class under this"),
    ({"name": "siren", "width": -1}, ValueError, "`Siren.width=-1`"),
    ({"name": "siren", "wide": 1}, TypeError, "unexpected keyword argument 'wide'"),
    ({"width": 3}, KeyError, "name"),
])  # fmt: skip
def test_what_does_not_describe_a_specification_is_refused(stored, error, message):
    with pytest.raises(error, match=message):
        NETWORKS.from_dict(stored)


@pytest.mark.parametrize(("name", "cls", "error", "message"), [
    ("mine", TGV, TypeError, "TGV'> cannot be registered: expected a frozen dataclass derived from Network"),
    ("mine", Loose, TypeError, "expected a frozen dataclass"),
    ("mine/net", Own, ValueError, "the network name 'mine/net' cannot be stored: expected letters, digits"),
    ("mine", Named, TypeError, "its field 'name' would be mixed up with its registered name"),
    ("siren", Own, ValueError, "the network name 'siren' is taken by .*Siren'>: choose another one"),
])  # fmt: skip
def test_only_frozen_dataclasses_of_the_kind_are_registered_under_a_free_name(name, cls, error, message):
    with pytest.raises(error, match=message):
        NETWORKS.register(name)(cls)
