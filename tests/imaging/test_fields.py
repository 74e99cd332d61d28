"""Fields of pictures, attributes and surfaces: their derivatives, and their files."""

import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from neurst.core import storage
from neurst.core.nets import Siren, Spline
from neurst.imaging import FitOptions, fit_attributes, fit_image, fit_surface, load_field

RNG = np.random.default_rng(0)
OPTIONS = {"device": "cpu", "progress": False, "steps": 40}


def picture():
    image = np.sin(np.mgrid[:24, :20].sum(0) / 5)[..., None] * [1.0, 0.5, 30.0]
    return fit_image(image, sigma=0.1, options=FitOptions(lam=10.0, **OPTIONS))


def attributes():
    points = 100 * RNG.random((200, 2))
    values = np.sin(points / 30) + 0.1 * RNG.standard_normal((200, 2))
    options = FitOptions(network=Siren(width=32, depth=2, omega=8.0), lam=20.0, **OPTIONS)
    field = fit_attributes(points, values, n_members=2, options=options)
    return dataclasses.replace(field, scores={20.0 / 3: -1.2, 20.0: -1.1})


def surface():
    directions = RNG.standard_normal((300, 3))
    ball = 30 * directions / np.linalg.norm(directions, axis=1, keepdims=True) + [5.0, 6.0, 7.0]
    return fit_surface(ball, bending_length=3.0, options=FitOptions(network=Spline((4, 8)), **OPTIONS))


# name: how it is made, its member fields, and places in its units
KINDS = {
    "picture": (picture, lambda f: [f], [[3.3, 4.4], [11.2, 9.9], [20.7, 18.6]]),
    "attributes": (attributes, lambda f: f.fields, [[33.0, 44.0], [61.5, 9.9], [2.5, 98.0]]),
    "surface": (surface, lambda f: [f.field], [[30.0, 6.0, 7.0], [-9.0, -8.0, 15.0], [5.0, 33.0, 17.0]]),
}


@pytest.fixture(scope="module")
def fields():
    return {name: make() for name, (make, _, _) in KINDS.items()}


def central_differences(f, x, step):
    shifts = step * np.eye(x.shape[1])
    return np.stack([(f(x + shift) - f(x - shift)) / (2 * step) for shift in shifts], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_per_unit_of_the_user_and_agree_with_central_differences(fields, kind):
    field, (_, members, x) = copy.deepcopy(fields[kind]), KINDS[kind]
    for member in members(field):
        member.net.double()
    x, step = np.array(x), 1e-5 * field.box.scale
    assert field.jacobian(x).shape == (3, field.n_channels, field.n_dims)
    slope, bend = (central_differences(f, x, step) for f in (field, field.jacobian))
    np.testing.assert_allclose(field.jacobian(x), slope, rtol=1e-6, atol=1e-8 * np.abs(slope).max())
    np.testing.assert_allclose(field.hessian(x), bend, rtol=1e-3, atol=1e-4 * np.abs(bend).max())
    values, alphas = field.partials(x, 2)
    for part, alpha in zip(np.moveaxis(values, -1, 0), alphas, strict=True):
        axes = np.repeat(np.arange(field.n_dims), alpha)
        expected = (field(x), field.jacobian(x), field.hessian(x))[len(axes)][(..., *axes)]
        np.testing.assert_allclose(part, expected, rtol=1e-9, atol=1e-9 * np.abs(bend).max())


READ = """
import sys
import numpy as np
from neurst.imaging import load_field
path, kinds = sys.argv[1], sys.argv[2:]
for kind in kinds:
    x, field = np.load(f"{path}/{kind}.npy"), load_field(f"{path}/{kind}")
    np.savez(f"{path}/{kind}.npz", field(x), field.jacobian(x), field.hessian(x))
"""


def test_fields_that_another_process_reads_give_the_same_numbers_bit_by_bit(fields, tmp_path):
    for kind, field in fields.items():
        field.save(tmp_path / kind)
        np.save(tmp_path / f"{kind}.npy", KINDS[kind][2])
    subprocess.run([sys.executable, "-c", READ, tmp_path, *KINDS], check=True)
    for kind, field in fields.items():
        read, x = np.load(tmp_path / f"{kind}.npz"), KINDS[kind][2]
        for there, here in zip(read.values(), (field(x), field.jacobian(x), field.hessian(x)), strict=True):
            np.testing.assert_array_equal(there, here)
    again, field = load_field(tmp_path / "surface"), fields["surface"]
    np.testing.assert_array_equal(again.mesh(24)[0], field.mesh(24)[0])
    assert (again.sigma, again.bending_length) == (field.sigma, field.bending_length)
    again, field = load_field(tmp_path / "attributes"), fields["attributes"]
    assert (again.lam, again.scores, list(again.sigma)) == (field.lam, field.scores, list(field.sigma))


def changed(**parts):
    def change(path):
        kind, content = storage.load(path)
        storage.save(path, kind, content | parts)

    return change


DAMAGED = "is damaged .*: save the field again"
DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is not a file that neurst saved, or it is damaged"),
    "no field": (lambda path: storage.save(path, "model", {"x": np.arange(3)}), "holds a 'model', which is not a field: expected one of .*'surface'"),
    "another kind": (lambda path: storage.save(path, "attributes", storage.load(path)[1]), DAMAGED),
    "points of another dimension": (changed(points=np.ones((9, 2))), DAMAGED),
    "no corner": (changed(low=np.full(3, np.nan)), DAMAGED),
    "negative noise": (changed(sigma=-1.0), DAMAGED),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_damaged_or_of_another_kind_is_refused(fields, tmp_path, damage, message):
    fields["surface"].save(tmp_path / "surface")
    damage(tmp_path / "surface")
    with pytest.raises(ValueError, match=message):
        load_field(tmp_path / "surface")
