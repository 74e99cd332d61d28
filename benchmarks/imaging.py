"""Pictures, cubes and points: the fields with their defaults, and what else one could use.

``NEURST_DATA=folder python benchmarks/imaging.py [denoise] [inpaint] [mixed] [points] [surface] [edges] [networks] [time]`` reads ``images``,
``hsi`` and ``points`` of that folder and writes the tables named (all if none is) of docs/benchmarks_tables.md. The classical methods have their parameters
chosen by an oracle that sees the truth of the same case; the fields do not. The classical methods of a case share a process; every field has one of its
own, so that its peak memory can be told.

``--cache FOLDER`` keeps what the classical methods found in ``FOLDER/baselines.json`` (task, case, method, scores) and does not run them again;
``--baselines`` runs them alone and writes no tables. Methods whose package is missing are left out of the tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imaging_baselines as classical
import imaging_data as data
import numpy as np
from numpy.typing import NDArray


def memory() -> float:
    """Peak memory of this process so far in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# The only calls of neurst's fits, one function each.


def options(**given):
    """Options of a fit that shows no progress bar."""
    from neurst.imaging import FitOptions

    return FitOptions(progress=False, **given)


def field_denoise(noisy: NDArray, **given) -> NDArray:
    """A picture without its noise, the level of which is not told."""
    from neurst.imaging import denoise

    return denoise(noisy, options=options(**given))


def field_denoise_lam_of_spline(noisy: NDArray, **given) -> NDArray:
    """The same by another network, at the prior strength that the default one chooses for itself."""
    from neurst.imaging import fit_image

    return field_denoise(noisy, lam=fit_image(noisy, options=options()).lam, **given)


def field_inpaint(image: NDArray, mask: NDArray, **given) -> NDArray:
    """A picture with its missing entries, the others known exactly."""
    from neurst.imaging import inpaint

    return inpaint(image, mask, options=options(**given))


def field_cube(noisy: NDArray) -> NDArray:
    """A cube without its noise of several kinds."""
    from neurst.imaging import denoise_cube

    return denoise_cube(noisy, options=options()).clean


def field_points(points: NDArray, values: NDArray, query: NDArray, **given) -> NDArray:
    """Attributes at points from noisy ones at others."""
    from neurst.imaging import recover_attributes

    return recover_attributes(points, values, query, options=options(**given))


def field_surface(points: NDArray) -> dict:
    """A mesh, and the noisy points on it."""
    from neurst.imaging import fit_surface

    surface = fit_surface(points, options=options())
    vertices, faces = surface.mesh(256)
    return {"vertices": vertices, "faces": faces, "points": surface.project(points)}


SLOW_STEPS = 400  # of networks that are read point by point


@dataclass(frozen=True)
class Task:
    """A table: its cases, and the methods by the name of their column."""

    names: Callable[[], list[str]]
    case: Callable[[str], data.Case]
    baselines: dict[str, Callable]  # case -> answer and note
    fields: dict[str, Callable]  # (**given) -> answer
    setting: str  # words over the table


def _denoise(**given) -> Callable:
    return lambda noisy, sigma: field_denoise(noisy, **given)


def _denoise_lam_of_spline(**given) -> Callable:
    return lambda noisy, sigma: field_denoise_lam_of_spline(noisy, **given)


def _inpaint(**given) -> Callable:
    return lambda image, mask: field_inpaint(image, mask, **given)


def _points(**given) -> Callable:
    return lambda points, values, query: field_points(points, values, query, **given)


def _variants(make: Callable) -> dict[str, Callable]:
    """The default, a simpler penalty, and none."""
    return {"neurst": make(), "isotropic": make(penalty="isotropic"), "no TV": make(lam=0.0)}


TASKS = {
    "denoise": Task(
        data.denoise_names,
        data.denoise_case,
        {"TV": classical.tv, "colour TV": classical.colour_tv, "TGV": classical.tgv, "BM3D": classical.bm3d},
        _variants(_denoise),
        "PSNR in dB of pictures with Gaussian noise (0.1 and 0.2 of the range, not clipped), cut to 256 x 256. TV (of each channel), colour TV and TGV (one norm "
        "over the channels) have the weight that is best for the same picture, BM3D is told the noise level, and neurst is told nothing.",
    ),
    "inpaint": Task(
        data.inpaint_names,
        data.inpaint_case,
        {
            "linear": classical.linear,
            "cubic": classical.cubic,
            "biharmonic": classical.biharmonic,
            "TV": classical.tv_inpainting,
            "colour TV": classical.colour_tv_inpainting,
        },
        _variants(_inpaint),
        "PSNR in dB of all entries from a fifth of them, each channel drawn by itself, without noise. Linear and cubic interpolation are nearest outside the "
        "hull; both TV are the least variation among the pictures that agree with what is known, so that nothing is left to choose.",
    ),
    "mixed": Task(
        data.mixed_names,
        data.mixed_case,
        {
            "TV of bands": classical.band_tv,
            "median + TV of bands": classical.median_tv,
            "TV of bands, 1-norm": classical.band_tv_l1,
            "robust PCA": classical.robust_pca,
            "rank + sparse": classical.godec,
            "rank + sparse, then TV": classical.low_rank_tv,
            "rank + sparse, then BM3D": classical.low_rank_bm3d,
        },
        {"neurst": field_cube},
        "Cubes in [0, 1] with mixed noise. Impulses: Gaussian noise of 0.1, a tenth of the entries replaced by 0 or 1. Stripes: Gaussian noise of 0.05, offsets in "
        "[-0.25, 0.25] of 10 to 20 % of the columns of 30 % of the bands, three columns of zeros in 10 % of the bands. PSNR and SSIM are means over bands, the angle is between "
        "spectra. Every classical method has its parameters (TV: for each band) chosen on the same cube.",
    ),
    "points": Task(
        data.points_names,
        data.points_case,
        {"nearest k": classical.neighbours, "kernel": classical.kernel, "kriging": classical.kriging},
        {"neurst": _points(), "no TV": _points(lam=0.0)},
        "Colours of 30,000 points of a scan from a fifth of them with Gaussian noise of 0.1: PSNR in dB at all points, at those observed and at the others. The "
        "classical methods have their parameters chosen on the same points.",
    ),
    "surface": Task(
        data.surface_names,
        data.surface_case,
        {
            "noisy points": classical.nothing,
            "planes": classical.planes,
            "Poisson": classical.poisson,
            "planes, then Poisson": classical.planes_poisson,
            "planes, then ball pivoting": classical.ball_pivoting,
            "clean mesh": classical.clean_mesh,
        },
        {"neurst": field_surface},
        "A scan's mesh from 10,000 of its points with noise of 5 thousandths of its longest side, the unit of all distances here. Projected: from the noisy points, put on the "
        "answer, to the mesh. Accuracy: from 30,000 points of the answer to the mesh; completeness: from 30,000 of the mesh to the answer; distance: their mean, "
        "exact on triangles. Chamfer: between 30,000 points of the answer (or the projected points) and 300,000 of the mesh; that of the clean mesh is its floor. "
        "Poisson, ball pivoting and planes have their parameters chosen by the true distance.",
    ),
    "edges": Task(
        data.edges_names,
        data.edges_case,
        {"TV": classical.tv, "TGV": classical.tgv, "BM3D": classical.bm3d},
        {penalty: _denoise(penalty=penalty) for penalty in ("isotropic", "space_variant", "hessian", "tgv")},
        "A drawn picture of 192 x 192 (discs, a ramp, a wedge, a line 1.5 pixels wide) with Gaussian noise of 0.1: PSNR in dB, and the root mean squared error "
        "within 3 pixels of edges, on the ramp and elsewhere. TV and TGV have the best weight for it, BM3D is told the noise level.",
    ),
    "networks": Task(
        data.networks_names,
        data.networks_case,
        {},
        {
            "spline": _denoise(),
            "low rank": _denoise(network="lowrank"),
            "sines": _denoise_lam_of_spline(network="siren", steps=SLOW_STEPS),
            "Fourier features": _denoise_lam_of_spline(network="fourier", steps=SLOW_STEPS),
        },
        f"The middle 96 x 96 pixels of four colour pictures with Gaussian noise of 0.1, by networks of the core under the default penalty. Spline: the default, 80 steps a fit. "
        f"Low rank: 96 sine factors along each axis, 1,000 steps a fit. Both choose lam by their own search. Sines: 3 layers of 256, omega 30, and Fourier features: 256 frequencies of "
        f"standard deviation 24, 2 layers of 256; both are read point by point, take {SLOW_STEPS} steps of 4,096 pixels and are given the lam of the spline, whose choice is in their seconds.",
    ),
}
NEEDS = {
    "BM3D": "bm3d",
    "rank + sparse, then BM3D": "bm3d",
    **dict.fromkeys(("Poisson", "planes, then Poisson", "planes, then ball pivoting"), "open3d"),
}


def run(task: str, name: str, *methods: str) -> dict:
    """Scores of methods on a case."""
    t, found = TASKS[task], {}
    case = t.case(name)
    for method in methods:
        if method in t.baselines:
            answer, note = t.baselines[method](case)
        else:
            before, begin = memory(), time.perf_counter()
            answer = t.fields[method](**case.given)
            note = {"seconds": time.perf_counter() - begin, "peak": memory(), "before": before}
        found[method] = case.score(answer) | note
    return found


def in_own_process(*arguments: str) -> dict:
    """What `run` finds in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--call", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


class Cache:
    """What baselines found before; a folder, or nothing."""

    def __init__(self, folder: str | None) -> None:
        self.path = None if folder is None else Path(folder) / "baselines.json"
        self.memory = {}

    def read(self) -> dict:
        """task -> case -> method -> scores."""
        known = self.path is not None and self.path.exists()
        return json.loads(self.path.read_text()) if known else self.memory

    def add(self, task: str, name: str, found: dict) -> None:
        """Merge and write at once, so that a reader never sees half a file."""
        everything = self.read()
        everything.setdefault(task, {}).setdefault(name, {}).update(found)
        self.memory = everything
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(everything, indent=1))
            os.replace(part, self.path)


def baselines_of(task: str, name: str, cache: Cache) -> dict:
    """Scores of the classical methods that can run here, from the cache where known."""
    known = cache.read().get(task, {}).get(name, {})
    runnable = [m for m in TASKS[task].baselines if m not in NEEDS or importlib.util.find_spec(NEEDS[m])]
    missing = [m for m in runnable if m not in known]
    if missing:
        cache.add(task, name, in_own_process(task, name, *missing))
    return {m: s for m, s in cache.read().get(task, {}).get(name, {}).items() if m in runnable}


def fields_of(task: str, name: str) -> dict:
    """Scores of the fields, each in a process of its own."""
    return {m: in_own_process(task, name, m)[m] for m in TASKS[task].fields}


def say(task: str, name: str, found: dict) -> None:
    """A line on the terminal."""
    print(task, name, {m: round(next(iter(s.values())), 3) for m, s in found.items()}, flush=True)


def cost(found: dict, method: str = "neurst") -> str:
    """Seconds and peak GB."""
    return f"{found[method]['seconds']:.0f} | {found[method]['peak']:.2f}"


def means(rows: dict[str, dict], groups: dict[str, list[str]], keys: tuple[str, ...] = ("psnr",)) -> dict[str, dict]:
    """Mean scores of each method over each group of cases."""
    of = lambda names, m: {key: float(np.mean([rows[name][m][key] for name in names])) for key in keys}
    return {f"**{title}**": {m: of(names, m) for m in rows[names[0]]} for title, names in groups.items() if names}


def wide(rows: dict[str, dict], groups: dict[str, list[str]]) -> list[str]:
    """A line for each case, PSNR by method, then what neurst costs."""
    methods = list(next(iter(rows.values())))
    bold = [f"**{m}**" if m == "neurst" else m for m in methods]
    lines = [f"| case | {' | '.join(bold)} | seconds | peak GB |", "|---" * (3 + len(methods)) + "|"]
    for name, found in (rows | means(rows, groups)).items():
        cells = " | ".join(f"{found[m]['psnr']:.2f}" for m in methods)
        lines.append(f"| {name} | {cells} | {cost(found) if 'seconds' in found['neurst'] else '- | -'} |")
    return lines


def tall(rows: dict[str, dict], scores: dict[str, str]) -> list[str]:
    """A line for each case and method, and its scores, each with its format."""
    lines = [f"| case | method | {' | '.join(scores)} | seconds | peak GB |", "|---" * (4 + len(scores)) + "|"]
    for name, found in rows.items():
        for method, s in found.items():
            cells = [format(s[key], form) if key in s else "-" for key, form in scores.items()]
            peak = f"{s['peak']:.2f}" if "peak" in s else "-"
            lines.append(f"| {name} | {method} | {' | '.join(cells)} | {s['seconds']:.1f} | {peak} |")
    return lines


def groups_of(task: str) -> dict[str, list[str]]:
    """Cases whose means stand under a wide table."""
    names = TASKS[task].names()
    if task == "inpaint":
        return {"mean": names}
    grey = lambda name: name.startswith("Set12")
    groups = {}
    for sigma in ("0.1", "0.2"):
        own = [n for n in names if n.endswith(sigma)]
        groups[f"grey, mean, {sigma}"] = [n for n in own if grey(n)]
        groups[f"colour, mean, {sigma}"] = [n for n in own if not grey(n)]
        groups[f"all, mean, {sigma}"] = own
    return groups


SHOWN = {
    "mixed": {"psnr": ".2f", "ssim": ".3f", "sam": ".2f"},
    "points": {"psnr": ".2f", "observed": ".2f", "others": ".2f"},
    "surface": dict.fromkeys(("projected", "accuracy", "completeness", "distance", "chamfer"), ".2f"),
    "networks": {"psnr": ".2f", "ssim": ".3f"},
    "edges": {"psnr": ".2f", "edges": ".4f", "ramp": ".4f", "elsewhere": ".4f"},
}
SECONDS = " Seconds are those of one run at the parameters shown to be best, the search for them not counted; those of neurst include all of its choices."


def table(task: str, cache: Cache) -> None:
    """Run what is not known, and write the table."""
    from tables import write

    rows = {}
    for name in TASKS[task].names():
        rows[name] = baselines_of(task, name, cache) | fields_of(task, name)
        say(task, name, rows[name])
    average = means(rows, {"mean": [*rows]}, (*SHOWN[task], "seconds", "peak")) if task == "networks" else {}
    lines = tall(rows | average, SHOWN[task]) if task in SHOWN else wide(rows, groups_of(task))
    searched = bool(TASKS[task].baselines) and task in SHOWN
    write(f"imaging-{task}", __file__, TASKS[task].setting + SECONDS * searched, lines)


COSTS = {
    "colour picture, 256 x 256": ("denoise", "Set5/butterfly_GT 0.1"),
    "cube, 100 x 100 x 198": ("mixed", "jasper_ridge impulses"),
}


def time_table() -> None:
    """What the defaults cost."""
    from tables import write

    lines = ["| what | seconds | peak GB of the process | of it before the call |", "|---" * 4 + "|"]
    for what, (task, name) in COSTS.items():
        r = in_own_process(task, name, "neurst")["neurst"]
        lines.append(f"| {what} | {r['seconds']:.1f} | {r['peak']:.2f} | {r['before']:.2f} |")
        print(lines[-1], flush=True)
    write("imaging-time", __file__, "Defaults, the choice of lam and of the noise level included.", lines)


COST_TABLES = {"time": time_table}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="*", metavar="table", help=f"of {', '.join([*TASKS, *COST_TABLES])}; all if none is named"
    )
    parser.add_argument("--cache", metavar="FOLDER")
    parser.add_argument("--baselines", action="store_true")
    asked = parser.parse_args()
    unknown = set(asked.tables) - {*TASKS, *COST_TABLES}
    if unknown:
        parser.error(f"no such table: {', '.join(unknown)}")
    classical.check()
    cache = Cache(asked.cache)
    for task in asked.tables or [*TASKS, *COST_TABLES]:
        if task in COST_TABLES:
            COST_TABLES[task]() if not asked.baselines else None
        elif asked.baselines:
            for name in TASKS[task].names():
                say(task, name, baselines_of(task, name, cache))
        else:
            table(task, cache)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        print(json.dumps(run(*sys.argv[2:])))
    else:
        main()
