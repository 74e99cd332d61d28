import inspect
import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from neurst.core import arguments as arg

ACCEPTED = [
    (arg.whole(0), np.uint16(7), 7),
    (arg.number(), np.float32(0.5), 0.5),
    (arg.number(0), np.array(3), 3.0),
    (arg.number(), Fraction(1, 4), 0.25),
    (arg.one_of("a", "b"), np.str_("b"), "b"),
    (arg.one_of("a", None), None, None),
    (arg.several(arg.SIZE), [1, np.int32(2)], (1, 2)),
    (arg.several(arg.SIZE), np.array([4, 8]), (4, 8)),
    (arg.several(arg.SIZE, least=0), (), ()),
    (arg.FLAG, np.True_, True),
    (arg.NAMES, "one", "one"),
    (arg.NAMES, pd.Index(["b", "a", "b"]), ("b", "a")),
    (arg.AUTO | arg.POSITIVE, np.int64(3), 3.0),
    (arg.NONE | arg.SIZE, None, None),
    (arg.instance(dict, "a dictionary"), {"a": 1}, {"a": 1}),
    (arg.PATH, "a/b", Path("a/b")),
]


@pytest.mark.parametrize(("rule", "value", "expected"), ACCEPTED)
def test_a_rule_gives_the_plain_type_of_what_it_accepts(rule, value, expected):
    found = rule("x", value)
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert [type(part) for part in found] == [type(part) for part in expected]


REFUSED = [
    (arg.whole(1, 5000), 5001, ValueError, "`x=5001`: expected a whole number >= 1 and <= 5,000"),
    (arg.whole(0), True, TypeError, "`x=True`: expected a whole number >= 0"),
    (arg.whole(0), 2.0, TypeError, "`x=2.0`"),
    (arg.number(), math.nan, ValueError, "`x=nan`: expected a finite number$"),
    (arg.number(0), -1e-9, ValueError, "`x=-1e-09`: expected a finite number >= 0$"),
    (arg.number(1, above=True), 1, ValueError, "`x=1`: expected a finite number > 1$"),
    (arg.number(), 10**400, ValueError, "`x=<int>`: expected a finite number"),
    (arg.number(), np.True_, TypeError, "`x=True`"),
    (arg.number(), 1j, TypeError, "`x=1j`"),
    (arg.number(), np.array([1.0, 2.0]), TypeError, r"`x=<ndarray of shape \(2,\)>`"),
    (arg.POSITIVE, 0, ValueError, "`x=0`: expected a positive, finite number"),
    (arg.SHARE, 0.95, ValueError, "`x=0.95`: expected a positive, .* <= 0.9"),
    (arg.one_of("a", "b", "c"), "d", ValueError, "`x='d'`: expected 'a', 'b' or 'c'"),
    (arg.several(arg.SIZE), [], ValueError, r"`x=\[\]`: expected a whole number >= 1 or a list of 1 or more of these"),
    (arg.several(arg.SIZE), [1, True], TypeError, r"`x=\[1, True\]`"),
    (arg.FLAG, 1, TypeError, "`x=1`: expected True or False"),
    (arg.TEXT, "", ValueError, "`x=''`: expected a name"),
    (arg.NAMES, [], ValueError, r"`x=\[\]`: expected a name or a list of one or more names"),
    (arg.NAMES, ["a", 1], TypeError, r"`x=\['a', 1\]`"),
    # of two rules, the first one says what is out of range
    (arg.AUTO | arg.POSITIVE, 0, ValueError, "`x=0`: expected 'auto' or a positive, finite number"),
    (arg.NONE | arg.AUTO | arg.SIZE, 0, ValueError, "`x=0`: expected None, 'auto' or a whole number >= 1"),
    (arg.LAM, -1, ValueError, "`x=-1`: expected 'auto' or a finite number >= 0; a prior strength in nats"),
    (arg.number(), 1e101, ValueError, r"`x=1e\+101`: expected a finite number .*beyond 1e\+100"),
    (arg.PATH, "", TypeError, "`x=''`: expected the path of a file"),
    (arg.PATH, "a\0", ValueError, "expected the path of a file"),
    (arg.instance(dict, "a dictionary"), [1], TypeError, r"`x=\[1\]`: expected a dictionary"),
]


@pytest.mark.parametrize(("rule", "value", "error", "message"), REFUSED)
def test_a_rule_names_the_argument_the_value_and_what_was_expected(rule, value, error, message):
    with pytest.raises(error, match=message) as caught:
        rule("x", value)
    assert caught.value.__cause__ is None  # one error, not a chain
    assert caught.value.__suppress_context__


def test_a_value_is_shown_in_full_only_if_it_is_short():
    assert arg.shown(np.float64(3.0)) == "3.0"
    assert arg.shown("ab") == "'ab'"
    assert arg.shown(list(range(100))) == "<list>"
    assert arg.shown(torch.zeros(3, 2)) == "<Tensor of shape (3, 2)>"
    assert arg.shown(pd.DataFrame({"a": [1]})) == "<DataFrame of shape (1, 1)>"


def test_a_checked_function_keeps_its_signature_and_checks_what_is_given():
    @arg.checked(n=arg.SIZE, scale=arg.NONE | arg.POSITIVE, names=arg.NAMES)
    def scaled(n, /, scale=None, *, names=("a",), other=-1):
        """Docstring."""
        return n, scale, names, other

    assert scaled.__name__ == "scaled"
    assert scaled.__doc__ == "Docstring."
    assert str(inspect.signature(scaled)) == "(n, /, scale=None, *, names=('a',), other=-1)"
    assert scaled.rules.keys() == {"n", "scale", "names"}
    assert scaled(np.int8(3)) == (3, None, ("a",), -1)
    assert scaled(3, 2, names=["b", "b"], other=True) == (3, 2.0, ("b",), True)
    with pytest.raises(ValueError, match="`scale=0`: expected None or a positive"):
        scaled(3, scale=0)
    with pytest.raises(TypeError, match=r"scaled\(\) missing .* 'n': it takes `n`, `scale`, `names`, `other`"):
        scaled()
    with pytest.raises(TypeError, match=r"scaled\(\) .* unexpected keyword argument 'scales': it takes `n`"):
        scaled(3, scales=1)


def test_fields_are_checked_by_their_defaults_and_stored_in_their_plain_types():
    @dataclass(frozen=True)
    class Config:
        size: int = 3
        width: float = 1.0
        shift: float = 0.0
        flag: bool = False
        name: str = "a"

        def __post_init__(self):
            arg.check_fields(self, shift=arg.number(), flag=arg.FLAG)

    found = Config(np.uint8(7), 2, np.float32(-1.5), np.True_, "b")
    assert found == Config(7, 2.0, -1.5, True, "b")
    assert [type(value) for value in vars(found).values()] == [int, float, float, bool, str]
    for numbers, message in [
        ({"size": 0}, "`Config.size=0`: expected a whole number >= 1"),
        ({"width": 0.0}, "`Config.width=0.0`: expected a positive, finite number"),
        ({"shift": math.inf}, "`Config.shift=inf`: expected a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Config(**numbers)


def test_a_warning_points_at_the_first_line_outside_the_package():
    inside = {"__name__": "neurst.somewhere", "warn": arg.warn}
    exec("def outer(): inner()\ndef inner(): warn('look out')", inside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside["outer"]()
    assert [(str(w.message), w.category, w.filename) for w in caught] == [("look out", UserWarning, __file__)]


# ---- arrays

BASE = np.arange(6.0).reshape(3, 2)
READ = {
    "a list": BASE.tolist(),
    "integers": BASE.astype(np.uint8),
    "float32, by columns": np.asfortranarray(BASE, dtype=np.float32),
    "reversed": BASE[::-1, ::-1].copy()[::-1, ::-1],
    "a tensor": torch.from_numpy(BASE).float().requires_grad_(),
    "a data frame": pd.DataFrame(BASE, columns=["x", "y"]),
    "objects": BASE.astype(object),
    "a masked array without masked entries": np.ma.array(BASE, mask=False),
}


@pytest.mark.parametrize("name", READ)
def test_whatever_holds_real_numbers_becomes_a_float64_array_without_gaps(name):
    found = arg.real_array("x", READ[name])
    assert type(found) is np.ndarray
    assert found.dtype == np.dtype("<f8")
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, BASE)
    np.testing.assert_array_equal(arg.coordinates("x", READ[name]), BASE)


def test_what_was_read_can_be_written_to_and_has_no_negative_strides():
    read_only, one_row = BASE.copy(), BASE[:1][::-1]  # NumPy calls one row contiguous, whatever its stride
    read_only.flags.writeable = False
    for value in (read_only, one_row):
        found = arg.coordinates("x", value)
        assert found.flags.writeable
        assert min(found.strides) > 0


NO_NUMBERS = [
    (np.ma.array(BASE, mask=BASE > 3), ValueError, "`x` is a masked array with 2 masked entries: fill or drop them"),
    (BASE * 1j, TypeError, r"`x` cannot be read as real numbers \(it holds complex128\): convert it first"),
    (BASE > 1, TypeError, "it holds bool"),
    (BASE.astype("M8[D]"), TypeError, "it holds datetime64"),
    (["1", "2"], TypeError, "it holds <U1"),
    ([[1.0, 2.0], [3.0]], ValueError, "`x` cannot be read as an array .*inhomogeneous"),
    (np.array([1.0, True], dtype=object), TypeError, "it holds booleans, texts or complex numbers"),
    ({"a": 1}, TypeError, "`x={'a': 1}`: expected an array"),
    ("12", TypeError, "`x='12'`: expected an array"),
    ([1.0, 1e101], ValueError, r"holds numbers up to 1e\+101: expected less than 1e\+100; look for overflow or a fill"),
    (torch.zeros(2, dtype=torch.bfloat16), ValueError, "BFloat16"),
    (pd.Series(pd.date_range("2020", periods=2, tz="UTC")), TypeError, "Timestamp"),
    (pd.Series(["1", "2"]), TypeError, "cannot be read as real numbers"),
]


@pytest.mark.parametrize(("value", "error", "message"), NO_NUMBERS)
def test_what_holds_no_real_numbers_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        arg.real_array("x", value)


@pytest.mark.parametrize(("value", "message"), [
    (np.zeros(3), r"`x` has shape \(3,\): expected \(N, 2\) or \(N, 3\) with N >= 2, one row for each point"),
    (np.zeros((1, 2)), r"`x` has shape \(1, 2\)"),
    ([[0, 1], [np.nan, 2], [3, np.inf]], r"not finite at 2 of 3 points \(first: row 1, \[nan, 2.0\]\): drop them"),
])  # fmt: skip
def test_coordinates_are_finite_and_one_row_for_each_point(value, message):
    with pytest.raises(ValueError, match=message):
        arg.coordinates("x", value, least=2)
