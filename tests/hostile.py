"""Hostile inputs for every public verb, generated from a seed.

``NEURST_DATA`` is not needed. ``python tests/hostile.py 5000`` tries 5,000 of them and prints every finding; ``test_hostile.py`` tries a sample.

An input is a finding unless the verb succeeds, or raises a TypeError, ValueError or KeyError (for files also an OSError) that was raised by
neurst itself and quotes in backticks what it is about, while the AnnData that was passed is as it was. A warning of a library, a call that
takes longer than `SECONDS`, or a result that a file cannot hold, is a finding as well.
"""

import copy
import dataclasses
import decimal
import fractions
import inspect
import json
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData, ImplicitModificationWarning
from matplotlib import pyplot
from scipy import sparse
from sections import QUICK, frozen, section

import neurst
from neurst import datasets, get, imaging, pl, tl
from neurst.core import nets, penalty, table
from neurst.imaging import FitOptions, metrics
from neurst.spatial.adata import changes
from neurst.spatial.priors import ALTERNATIVES, Constant, GaussianProcess
from neurst.spatial.spec import ExpressionConfig

SECONDS = 30
HOME = str(Path(neurst.__file__).parent)
FAST = FitOptions(lam=10.0, steps=2, progress=False)

# ---- what may stand in the place of any argument

SCALARS = [
    None, True, False, np.True_, 0, -1, 1, 2, 3, 7, 10**6, 10**30, 0.0, -0.5, 0.3, 1.5, 1e-300, 1e300, np.nan, np.inf, -np.inf,
    np.int8(3), np.uint16(5), np.float32(2.5), np.float64(0.25), 1j, np.complex64(2), decimal.Decimal("1.5"), fractions.Fraction(1, 3),
    np.datetime64("2020-01-01"), pd.Timestamp("2020-01-01"), np.ma.masked, pd.NA, Ellipsis, NotImplemented,
]  # fmt: skip
TEXTS = [
    "", " ", "auto", "a", "neurtv", "spatial", "mixed", "random", "block", "siren", "nuclear", "gaussian_process", "constant", "cosine", "a/b", "/", ".", "..", "_index", "__x",
    "a\0b", "\n", "é", "\ud800", "x" * 300, "NaN", "p101", "p", "cpu", "cuda:7", "mps", b"bytes", np.str_("layer"),
]  # fmt: skip
THINGS = [
    [], (), {}, set(), [None], ["a"], [1, 2], (1.0, -1.0), [1, "a"], {"a": 1}, range(3), object(), int, nets.Siren, nets.Siren(width=8, depth=1),
    penalty.TGV(), penalty.NuclearTV, GaussianProcess(functions=9), Constant(), lambda x: x, np.array(3.0), np.array([]), np.array([1.0, 2.0]), np.array(["a"]), torch.tensor(2.0),
    torch.ones(3), pd.Series([1.0, 2.0]), pd.DataFrame({"a": [1.0]}), sparse.eye(3).tocsr(), np.ma.masked_array([1.0, 2.0], [True, False]),
    Ellipsis, Path("x"), FitOptions(lam=1.0), ExpressionConfig(), AnnData(),
]  # fmt: skip
ANY = [*SCALARS, *TEXTS, *THINGS]
MOST = 3e5  # numbers above it are asked for work that is honest but long, so they are not generated for these arguments
LONG = {"steps", "batch_points", "batch_pixels", "n_regularisation"}


def pick(rng, values):
    return values[rng.integers(len(values))]


def shown(value):
    text = repr(value)
    return text if len(text) < 60 else f"<{type(value).__name__}>"


# ---- what may be done to an array


def _spoil(x, value, share=0.1):
    out = np.array(x, dtype=float)
    out.ravel()[:: max(1, int(1 / share))] = value
    return out


FACTORS = {"huge": 1e200, "large": 1e20, "small": 1e-24, "denormal": 1e-310, "negative": -1.0}
TYPES = [str, object, np.float16, np.float32, np.longdouble, ">f8", "datetime64[s]", complex]
POISONS = {"nan": (np.nan, 0.1), "one nan": (np.nan, 1e-9), "inf": (np.inf, 0.1), "one outlier": (1e12, 1e-9)}
ARRAYS = {
    **{name: lambda x, k=k: np.asarray(x, float) * k for name, k in FACTORS.items()},
    **{f"{k:g} is added": lambda x, k=k: np.asarray(x, float) + k for k in (1e7, 1e15)},
    **{name: lambda x, poison=poison: _spoil(x, *poison) for name, poison in POISONS.items()},
    **{f"all {k}": lambda x, k=k: np.full(np.shape(x), k) for k in (np.nan, 0.7, 0.0)},
    **{str(t): lambda x, t=t: np.asarray(x).astype(float).astype(t) for t in TYPES},
    **{f"{n} rows": lambda x, n=n: np.asarray(x)[:n] for n in (0, 1, 3, 5)},
    "rounded": lambda x: np.round(np.asarray(x, float)),
    "masked": lambda x: np.ma.masked_array(x, np.asarray(x) > np.median(x)),
    "mask of nothing": lambda x: np.ma.masked_array(x),
    "all masked": lambda x: np.ma.masked_array(x, True),
    "bool": lambda x: np.asarray(x) > np.mean(x),
    "object holes": lambda x: np.where(np.asarray(x) > np.mean(x), None, x),
    "uint8": lambda x: np.clip(np.asarray(x, float) * 10, 0, 255).astype(np.uint8),
    "int16": lambda x: (np.asarray(x, float) * 10).clip(-1000, 1000).astype(np.int16),
    "uint64": lambda x: (np.abs(np.asarray(x, float)) * 10).clip(0, 1e6).astype(np.uint64),
    "structured": lambda x: np.zeros(len(x), dtype=[("x", float), ("y", float)]),
    "backwards": lambda x: np.asarray(x)[::-1],
    "columns first": lambda x: np.asfortranarray(x),
    "transposed": lambda x: np.asarray(x).T,
    "strided": lambda x: np.repeat(np.asarray(x), 2, axis=0)[::2],
    "read only": lambda x: np.lib.stride_tricks.as_strided(x, writeable=False),
    "broadcast": lambda x: np.broadcast_to(np.asarray(x)[:1], np.shape(x)),
    "list": lambda x: np.asarray(x).tolist(),
    "tuple": lambda x: tuple(map(tuple, np.atleast_2d(np.asarray(x)).tolist())),
    "tensor": lambda x: torch.as_tensor(np.asarray(x, dtype=np.float32)),
    "tensor with a gradient": lambda x: torch.as_tensor(np.asarray(x, dtype=float)).requires_grad_(),
    "frame": lambda x: pd.DataFrame(np.asarray(x)) if np.ndim(x) == 2 else pd.Series(np.ravel(x)),
    "matrix": lambda x: np.matrix(x) if np.ndim(x) == 2 else x,
    "sparse": lambda x: sparse.csr_matrix(x) if np.ndim(x) == 2 else x,
    "ragged": lambda x: [list(np.ravel(x)[:2]), list(np.ravel(x)[:1])],
    "one more axis": lambda x: np.asarray(x)[..., None],
    "one axis less": lambda x: np.ravel(x),
    "no columns": lambda x: np.asarray(x)[..., :0],
    "one column": lambda x: np.asarray(x)[..., :1],
    "more columns": lambda x: np.concatenate([np.asarray(x)] * 2, axis=-1),
    "twice the rows": lambda x: np.concatenate([np.asarray(x)] * 2),
    "scalar": lambda x: 3.0,
    "three places": lambda x: np.asarray(x)[np.arange(len(x)) % 3],
    "a line": lambda x: np.outer(np.arange(len(x)), np.ones(np.shape(x)[-1])),
    "pairs": lambda x: np.repeat(np.asarray(x)[: (len(x) + 1) // 2], 2, axis=0)[: len(x)] + 1e-9 * np.arange(len(x)).reshape(-1, *[1] * (np.ndim(x) - 1)),
}  # fmt: skip


def an_array(rng, x):
    """A hostile array in place of an array: changed once or twice, or something else."""
    if rng.random() < 0.15:
        return "not an array", pick(rng, ANY)
    names = [pick(rng, list(ARRAYS)) for _ in range(1 + (rng.random() < 0.25))]
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x = ARRAYS[name](x)
        except Exception:  # noqa: BLE001  this change cannot be made to what the first one left
            continue
    return ", ".join(names), x


# ---- what may be done to an AnnData


def _leaves(tree, path=()):
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))


def damage(rng, adata):
    """Change something anywhere in the stored fit."""
    path = pick(rng, list(_leaves(adata.uns["neurtv"])))
    slot = adata.uns["neurtv"]
    for name in path[:-1]:
        slot = slot[name]
    value = slot[path[-1]]
    kind = pick(rng, ["drop", "anything", "array", "huge"])
    if kind == "drop":
        del slot[path[-1]]
    elif kind == "array" and isinstance(value, np.ndarray) and value.dtype.kind == "f":
        slot[path[-1]] = an_array(rng, value)[1]
    elif kind == "huge":
        slot[path[-1]] = pick(rng, [10**9, 10**30, -(10**9), 1e300])
    else:
        slot[path[-1]] = pick(rng, ANY)
    return f"{kind} at {'/'.join(map(str, path))}"


def _set(part, name):
    def change(rng, adata):
        where = getattr(adata, part)
        value = pick(rng, ANY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            where[name] = value
        return f"{part}[{name!r}] = {shown(value)}"

    return change


def _array(rng, adata):
    if rng.random() < 0.5:
        name, adata.obsm["spatial"] = an_array(rng, adata.obsm["spatial"])
        return f"obsm['spatial']: {name}"
    name, adata.X = an_array(rng, adata.X.toarray())
    return f"X: {name}"


def _drop(rng, adata):
    part = pick(rng, ["obsm", "uns", "layers", "varm", "obs", "var"])
    names = list(getattr(adata, part))
    if not names:
        return f"nothing to drop in {part}"
    name = pick(rng, names)
    del getattr(adata, part)[name]
    return f"{part} without {name!r}"


def _names(rng, adata):
    part = pick(rng, ["obs_names", "var_names"])
    names = getattr(adata, part)
    kind = pick(rng, ["renamed", "twice the same", "numbers", "reversed"])
    changed = {
        "renamed": [f"other{i}" for i in range(len(names))],
        "twice the same": [names[0], names[0], *names[2:]],
        "numbers": [str(i) for i in range(len(names))],
        "reversed": list(names[::-1]),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(adata, part, changed)
    return f"{part}: {kind}"


def _pictures(rng, adata):
    diameter, scale, picture, anything = pick(rng, SCALARS), pick(rng, ANY), pick(rng, ANY), pick(rng, ANY)
    pictures = [{}, {"a": {}, "b": {}}, {"a": {"scalefactors": {"spot_diameter_fullres": diameter}}}]
    adata.uns["spatial"] = pick(rng, [*pictures, {"a": {"scalefactors": scale}}, {"a": picture}, anything])
    return "uns['spatial']"


def _take(rng, adata):
    kind = pick(rng, ["view", "few spots", "one gene", "no genes", "no spots", "reversed"])
    view = {
        "view": lambda: adata[::2],
        "few spots": lambda: adata[: rng.integers(1, 8)],
        "one gene": lambda: adata[:, :1],
        "no genes": lambda: adata[:, :0],
        "no spots": lambda: adata[:0],
        "reversed": lambda: adata[::-1, ::-1],
    }[kind]()
    copied = rng.random() < 0.5 and adata.X is not None and len(np.shape(adata.X)) == 2  # others cannot be copied
    return kind, view.copy() if copied else view


REFUSED_BY_ANNDATA = (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)
CHANGES = [
    _array, _array, _array, _array, _drop, _names, _pictures, _set("obs", "in_tissue"), _set("obs", "section"), _set("uns", "neurtv"),
    _set("layers", "counts"), _set("obsm", "spatial"), _set("obsm", "X_neurtv"), _set("var", "neurtv_fitted"), _set("uns", "holdout_score"),
]  # fmt: skip


def an_adata(rng, adata, *, fitted):
    """A hostile AnnData in place of an AnnData."""
    if rng.random() < 0.1:
        value = pick(rng, ANY)
        return f"adata={shown(value)}", value
    whole, adata = adata, adata.copy()
    adata.uns = copy.deepcopy(dict(adata.uns))
    words, wanted = [], 1 + (rng.random() < 0.3)
    while len(words) < wanted:
        change = damage if fitted and rng.random() < 0.4 else pick(rng, CHANGES)
        try:
            words.append(change(rng, adata))
        except REFUSED_BY_ANNDATA:
            continue  # another change is drawn, so that no case is left as it was
    if rng.random() < 0.3:
        kind, adata = _take(rng, adata)
        words.append(kind)
    try:
        frozen(adata)
    except REFUSED_BY_ANNDATA:  # AnnData took what it cannot hold, so that nothing can be compared
        return an_adata(rng, whole, fitted=fitted)
    return "; ".join(words), adata


# ---- the verbs, with arguments that suit them


class Materials:
    """Small data that suit each verb."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.section = section(radius=3)
        self.fitted = section(radius=3)
        tl.neurtv_fit(self.fitted, **QUICK | {"penalty": ["nuclear", "gaussian_process"]})
        tl.neurtv_gradient(self.fitted)
        tl.holdout_score(self.fitted, **QUICK)
        self.image = np.add.outer(np.arange(12.0), np.arange(9.0)) + rng.normal(0, 0.3, (12, 9))
        self.cube = self.image[:, :, None] * [1.0, 0.5, 2.0] + rng.normal(0, 0.1, (12, 9, 3))
        self.points = rng.uniform(0, 5, (60, 2))
        self.values = np.stack([np.sin(self.points[:, 0]), self.points[:, 1]], 1)
        angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        self.circle = 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.surface = imaging.fit_surface(self.circle, bending_length=0.5, options=FAST)
            self.attributes = imaging.fit_attributes(self.points, self.values, n_members=1, options=FAST)
            self.image_field = imaging.fit_image(self.image, options=FAST)
        self.query = self.fitted.obsm["spatial"][:5] + 10.0


def verbs(m):
    """Name of each verb: the function, arguments that suit it, and those among them that are arrays."""
    fit = QUICK | {"n_members": 1, "steps": 2}
    truth = m.image
    cube_options = imaging.CubeConfig()
    found = {
        "tl.neurtv_fit": (tl.neurtv_fit, {"adata": m.section, **fit}, ()),
        "tl.neurtv_superres": (tl.neurtv_superres, {"adata": m.fitted}, ()),
        "tl.neurtv_query": (tl.neurtv_query, {"adata": m.fitted, "coords": m.query}, ("coords",)),
        "tl.neurtv_gradient": (tl.neurtv_gradient, {"adata": m.fitted}, ()),
        "tl.holdout_score": (tl.holdout_score, {"adata": m.section, "baselines": "nearest", **fit}, ()),
        "get.field": (get.field, {"adata": m.fitted}, ()),
        "get.params": (get.params, {"adata": m.fitted}, ()),
        "pl.superres": (pl.superres, {"adata": m.fitted, "genes": m.fitted.var_names[0]}, ()),
        "pl.gradient": (pl.gradient, {"adata": m.fitted}, ()),
        "pl.history": (pl.history, {"adata": m.fitted}, ()),
        "pl.holdout_score": (pl.holdout_score, {"adata": m.fitted}, ()),
        "datasets.synthetic_visium": (datasets.synthetic_visium, {"n_genes": 20}, ()),
        "imaging.fit_image": (imaging.fit_image, {"image": m.image, "options": FAST}, ("image", "mask")),
        "imaging.denoise": (imaging.denoise, {"image": m.image, "options": FAST}, ("image",)),
        "imaging.inpaint": (imaging.inpaint, {"image": m.image, "mask": m.image > 3, "options": FAST}, ("image", "mask")),
        "imaging.upsample": (imaging.upsample, {"image": m.image, "scale": 2, "options": FAST}, ("image",)),
        "imaging.denoise_cube": (imaging.denoise_cube, {"cube": m.cube, "options": FAST, "config": cube_options}, ("cube",)),
        "imaging.fit_attributes": (imaging.fit_attributes, {"points": m.points, "values": m.values, "n_members": 1, "options": FAST}, ("points", "values", "sigma")),
        "imaging.recover_attributes": (imaging.recover_attributes, {"points": m.points, "values": m.values, "n_members": 1, "query": m.points[:4], "options": FAST}, ("points", "values", "query")),
        "imaging.fit_surface": (imaging.fit_surface, {"points": m.circle, "normals": m.circle, "bending_length": 0.5, "options": FAST}, ("points", "normals")),
        "surface.mesh": (m.surface.mesh, {"resolution": 12}, ()),
        "metrics.psnr": (metrics.psnr, {"image": truth, "truth": truth + 1}, ("image", "truth")),
        "metrics.mpsnr": (metrics.mpsnr, {"cube": m.cube, "truth": m.cube + 1}, ("cube", "truth")),
        "metrics.ssim": (metrics.ssim, {"image": truth, "truth": truth + 1}, ("image", "truth")),
        "metrics.rmse": (metrics.rmse, {"image": truth, "truth": truth + 1}, ("image", "truth")),
        "metrics.sam": (metrics.sam, {"cube": m.cube, "truth": m.cube + 1}, ("cube", "truth")),
        "metrics.chamfer": (metrics.chamfer, {"a": m.points, "b": m.circle}, ("a", "b")),
        "table.partials": (table.partials, {"f": lambda x: x**2, "x": torch.ones(3, 2).double(), "order": 2}, ()),
    }  # fmt: skip
    fields = {
        "expression": get.field(m.fitted),
        "attributes": m.attributes,
        "image": m.image_field,
        "surface": m.surface,
    }
    for name, field in fields.items():
        coords = m.query if name == "expression" else m.points[:5]
        for read in ("__call__", "jacobian", "hessian", "latent", "std", "boundary", "distance", "normals", "project"):
            if hasattr(field, read) and not (read == "std" and field.spread is None):
                found[f"{name}.{read}"] = (
                    _positional(getattr(field, read)),
                    {"coords": coords},
                    ("coords",),
                )
        found[f"{name}.partials"] = (field.partials, {"coords": coords, "order": 1}, ("coords",))
    found["expression.select"] = (fields["expression"].select, {"genes": list(m.fitted.var_names[:2])}, ())
    configs = [FitOptions, imaging.LineSearch, imaging.ImageConfig, imaging.CubeConfig, imaging.AttributeConfig]
    configs += [imaging.SurfaceConfig, ExpressionConfig]
    for cls in (
        *configs,
        *nets.NETWORKS.values(),
        *penalty.PENALTIES.values(),
        *ALTERNATIVES.values(),
        datasets.SyntheticTissue,
    ):
        found[cls.__name__] = (cls, {}, ())
    return {name: verb for name, verb in found.items() if parameters(*verb[:2])}


def _positional(function):
    return lambda coords: function(coords)


def parameters(function, arguments):
    """Names that a verb takes."""
    if dataclasses.is_dataclass(function):
        return [f.name for f in dataclasses.fields(function) if f.init]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


@dataclasses.dataclass
class Case:
    """One call, what is odd about it, and the AnnData that must stay as it was if the call fails."""

    verb: str
    words: str
    call: object
    adata: object = None
    stop: tuple | None = None

    def __str__(self):
        return f"{self.verb}: {self.words}"


def make_case(seed, m, table):
    """The case of a seed."""
    rng = np.random.default_rng(seed)
    verb = pick(rng, list(table))
    function, arguments, arrays = table[verb]
    arguments, words = dict(arguments), []
    if "adata" in arguments and rng.random() < 0.6:
        word, arguments["adata"] = an_adata(rng, arguments["adata"], fitted=arguments["adata"] is m.fitted)
        words.append(word)
    names = [name for name in parameters(function, arguments) if name != "adata"]
    wanted = len(words) + (pick(rng, [0, 1, 1, 2]) if words else pick(rng, [1, 1, 2]))
    while len(words) < wanted:
        name = pick(rng, names)
        if name in arrays:
            like = arguments.get(name)
            like = like if like is not None else m.image > 3 if name == "mask" else m.image
            word, value = an_array(rng, like)
        else:
            value = pick(rng, ANY)
            word = shown(value)
        if name == "f" and callable(value):  # what a function of the caller raises is the caller's
            continue
        if name in LONG and isinstance(value, (int, np.integer)) and value > MOST:
            continue
        arguments[name] = value
        words.append(f"{name}={word}")
    adata = arguments.get("adata") if isinstance(arguments.get("adata"), AnnData) else None
    stop = None
    if adata is not None and verb in ("tl.neurtv_fit", "tl.neurtv_gradient", "tl.holdout_score") and rng.random() < 0.2:
        stop = (pick(rng, [KeyboardInterrupt, MemoryError]), int(rng.integers(0, 12)))
        words.append(f"{stop[0].__name__} at write {stop[1]}")
    return Case(verb, ", ".join(words), lambda: function(**arguments), adata, stop)


def make_file_case(seed, m, folder):
    """A saved field whose header was changed, and read."""
    rng = np.random.default_rng(seed)
    field, path = pick(rng, [m.image_field, m.attributes, m.surface]), Path(folder) / "field.safetensors"
    path.unlink(missing_ok=True)
    field.save(path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    part = told = json.loads(header["__metadata__"]["neurst"])
    *names, last = pick(rng, list(_leaves(told)))
    for name in names:
        part = part[name]
    part[last] = value = pick(rng, [None, 10**9, 10**30, -1, "x", [], {}, 0.5, True])
    header["__metadata__"]["neurst"] = json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return Case("imaging.load_field", f"{type(field).__name__}, {last}={value}", lambda: imaging.load_field(path))


@contextmanager
def stopped(stop):
    """Raise an error, once, when a slot is to be written after so many."""
    if stop is None:
        yield
        return
    error, left = stop
    put = changes._put

    def at_write(*arguments):
        nonlocal left
        left -= 1
        if left == -1:
            raise error
        put(*arguments)

    changes._put = at_write
    try:
        yield
    finally:
        changes._put = put


class TooLong(BaseException):
    """A call took too long."""


def _alarm(*_):
    raise TooLong


def finding(case, folder):
    """What is wrong with how a case was treated; None if nothing is."""
    before = None if case.adata is None else frozen(case.adata)
    state, threads = torch.get_rng_state(), torch.get_default_dtype()
    error = None
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), stopped(case.stop):
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", ImplicitModificationWarning)
            case.call()
    except TooLong:
        return f"it took longer than {SECONDS} s"
    except BaseException as caught:  # noqa: BLE001  an interrupt is one of the cases
        error = caught
    finally:
        signal.alarm(0)
        pyplot.close("all")
    if not torch.equal(state, torch.get_rng_state()) or torch.get_default_dtype() != threads:
        return "it changed the random state or the default type of torch"
    if error is None:
        return None if case.adata is None or case.adata.isbacked else _unwritable(case, folder)
    if before is not None and frozen(case.adata) != before:
        return f"the AnnData was changed, although the call failed with {error!r}"
    if case.stop is not None and type(error) is case.stop[0]:
        return None
    return _raw(error)


def _raw(error):
    """Why an error is not one in the words of neurst."""
    allowed = (TypeError, ValueError, KeyError, ImportError, OSError)
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {str(error)[:300]!r} from {where.filename}:{where.lineno}"
    if not isinstance(error, allowed):
        return f"an error of another kind, {text}"
    if not where.filename.startswith(HOME):
        return f"the error of a library, {text}"
    if "`" not in str(error):
        return f"an error that names no argument, {text}"
    return None


def _unwritable(case, folder):
    if case.verb != "tl.neurtv_fit":
        return None
    plain = AnnData(sparse.csr_matrix(case.adata.shape), obs=case.adata.obs[[]], var=case.adata.var[[]])
    plain.uns = {name: case.adata.uns[name] for name in case.adata.uns if name not in ("spatial", "layer_colors")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.write_h5ad(Path(folder) / "a.h5ad")
    except Exception as error:  # noqa: BLE001
        return f"what was written cannot be stored: {error!r}"
    return None


def findings(seeds):
    """All findings among the cases of these seeds: (seed, case, what is wrong)."""
    pyplot.switch_backend("Agg")
    m = Materials()
    table = verbs(m)
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            case = make_file_case(seed, m, folder) if seed % 12 == 0 else make_case(seed, m, table)
            wrong = finding(case, folder)
            if wrong is not None:
                yield seed, case, wrong


if __name__ == "__main__":
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    n = 0
    for seed, case, wrong in findings(range(first, first + int(sys.argv[1]))):
        n += 1
        print(f"{seed}: {case}\n    {wrong}", flush=True)
    print(f"{n} findings")
