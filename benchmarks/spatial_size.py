"""What fits and queries cost: time, peak memory, and how both grow.

``NEURST_DATA=folder python benchmarks/spatial_size.py [speed] [fits] [growth] [steps]`` reads ``spatial/*.h5ad`` of that folder and writes the
tables named (all if none is) of docs/benchmarks_tables.md, and docs/figures/growth.png. Every fit and query runs in a process of its
own, so that its peak memory can be told.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from anndata import AnnData
from protocol import load, read
from scipy import sparse
from tables import ROOT, write

import neurst
from neurst.spatial.evaluate.baselines import kernel_cv, kriging_rate
from neurst.spatial.evaluate.scores import deviance_explained
from neurst.spatial.evaluate.splits import split

VISIUM, WHOLE_BRAIN = "visium_dlpfc_151673", "iss_coronal_bin50"
LOCATIONS = (5_000, 24_000, 50_000, 178_180)


def memory() -> float:
    """Peak memory of this process so far in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measured(what: str, act: Callable, **more) -> dict:
    """Seconds and peak memory of a call."""
    before, begin = memory(), time.perf_counter()
    act()
    return {"what": what, "seconds": time.perf_counter() - begin, "before": before, **more}


def visium() -> AnnData:
    """The section with all genes of its file."""
    adata = read(VISIUM)
    adata.X = sparse.csr_matrix(adata.X)
    return adata


def small() -> AnnData:
    """The section with 300 genes."""
    coords, counts, size, genes = load(VISIUM, 300)
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    adata.var_names, adata.obsm["spatial"], adata.obs["total"] = genes, coords, size
    return adata


def kriging() -> dict:
    """The baseline's time: 30 components of residuals, from the spots to the spots."""
    adata = small()
    coords, size = adata.obsm["spatial"], adata.obs["total"].to_numpy()
    arguments = coords, adata.X.toarray().astype(float), size, coords, size
    return measured("kriging, 3,639 spots x 300 genes", lambda: kriging_rate(*arguments))


def automatic() -> dict:
    """Defaults on 300 genes."""
    adata = small()
    fit = lambda: neurst.tl.neurtv_fit(adata, size_factors="total", progress=False)
    return measured("neurst, 3,639 spots x 300 genes, defaults", fit)


def single() -> dict:
    """One member at a known strength on 300 genes."""
    adata = small()
    options = {"lam": 100, "penalty": "nuclear", "n_members": 1, "size_factors": "total", "progress": False}
    what = "the same, one member, one penalty, lam given"
    return measured(what, lambda: neurst.tl.neurtv_fit(adata, **options))


def thousand() -> dict:
    """The 1,000 most variable genes."""
    adata = visium()
    total = np.asarray(adata.X.sum(1)).ravel()
    mean = np.outer(total, np.asarray(adata.X.sum(0)).ravel() / total.sum())
    spread = ((adata.X.toarray() - mean) ** 2 / np.maximum(mean, 1e-9)).mean(0)
    part = adata[:, np.argsort(-spread)[:1000]].copy()
    part.obs["total"] = total
    del mean
    fit = lambda: neurst.tl.neurtv_fit(part, size_factors="total", progress=False)
    return measured("neurst, 3,639 spots x 1,000 genes, defaults", fit)


def transcriptome() -> dict:
    """15,000 genes: the file's 5,000, and binomial thinnings of them to a half and to a quarter."""
    adata, rng = visium(), np.random.default_rng(0)
    parts = [adata.X]
    for share in (0.5, 0.25):
        thinned = adata.X.copy()
        thinned.data = rng.binomial(thinned.data.astype(int), share).astype(np.float32)
        thinned.eliminate_zeros()
        parts.append(thinned)
    whole = AnnData(sparse.hstack(parts, format="csr"), obs=adata.obs)
    whole.obsm["spatial"] = adata.obsm["spatial"]
    what = f"neurst, {whole.n_obs:,} spots x {whole.n_vars:,} genes, defaults"
    return measured(what, lambda: neurst.tl.neurtv_fit(whole, progress=False))


def locations(n: str = "178180") -> dict:
    """Bins of a whole brain section, the nearest n to its middle: the time for all of them, and scores with a random fifth of them hidden."""
    adata = read(WHOLE_BRAIN)
    xy = np.asarray(adata.obsm["spatial"], float)[:, :2]
    near = np.argsort(np.linalg.norm(xy - np.median(xy, 0), axis=1), kind="stable")[: int(n)]
    adata = adata[np.sort(near)].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    train, test = split(adata.obsm["spatial"][:, :2], random_state=0)
    part, hidden = adata[train].copy(), adata[test]
    what = f"neurst, {adata.n_obs:,} locations x {adata.n_vars} genes, defaults"
    found = measured(what, lambda: neurst.tl.neurtv_fit(adata, progress=False), n=int(n))
    peak = memory()
    neurst.tl.neurtv_fit(part, progress=False)
    field, counts = neurst.get.field(part), sparse.csr_array(hidden.X)
    size, of_part = np.asarray(counts.sum(1)).ravel(), np.asarray(part.X.sum(1)).ravel()
    null = np.asarray(part.X.sum(0)).ravel() / of_part.sum()
    xy, own = hidden.obsm["spatial"], field(hidden.obsm["spatial"]) / field.target_sum
    kernel = kernel_cv(np.asarray(part.obsm["spatial"], float), sparse.csr_array(part.X).astype(float), of_part, xy)
    scores = [deviance_explained(counts, size, rate, null) for rate in (own, kernel)]
    return found | {"score": scores[0], "kernel": scores[1], "fit_peak": peak}


def superres() -> dict:
    """Super-resolution and its gradient on 300 genes."""
    adata = small()
    neurst.tl.neurtv_fit(adata, lam=200, steps=60, size_factors="total", progress=False)
    n_points, n_genes = neurst.tl.neurtv_superres(adata).shape
    act = lambda: neurst.tl.neurtv_gradient(neurst.tl.neurtv_superres(adata))
    return measured(f"super-resolution and gradient, {n_points:,} points x {n_genes} genes", act)


def query() -> dict:
    """A million points of a hundred genes."""
    adata = neurst.datasets.synthetic_visium()
    neurst.tl.neurtv_fit(adata, lam=400, steps=50, progress=False)
    low, high = adata.obsm["spatial"].min(0), adata.obsm["spatial"].max(0)
    points = np.random.default_rng(0).uniform(low, high, (1_000_000, 2))
    genes = list(adata.var_names[:100])
    read = lambda: neurst.tl.neurtv_query(adata, points, genes=genes, outside="extrapolate")
    return measured(f"query, 1,000,000 points x {len(genes)} genes, two members", read)


def in_own_process(function: str, *arguments: str) -> dict:
    """A function of this file in a new process: its result and its peak memory in GB."""
    command = [sys.executable, "-W", "ignore", __file__, "--call", function, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(name: str, functions: tuple[str, ...], setting: str) -> None:
    """One line for each fit or query; `setting` may name the seconds of each."""
    lines, seconds = ["| what | seconds | peak GB of the process | of it before the call |", "|---" * 4 + "|"], {}
    for function in functions:
        r = in_own_process(function)
        seconds[function] = r["seconds"]
        lines.append(f"| {r['what']} | {r['seconds']:.1f} | {r['peak']:.2f} | {r['before']:.2f} |")
        print(lines[-1], flush=True)
    write(name, __file__, setting.format(**seconds), lines)


def speed_table() -> None:
    """The default fit beside kriging."""
    ratios = "Defaults / kriging: {automatic:.1f} / {kriging:.1f}; one member / kriging: {single:.1f} / {kriging:.1f} seconds."
    setting = f"Defaults are the choice of every lam and weight, two networks and a Gaussian process. {ratios}"
    table("speed", ("kriging", "automatic", "single"), setting)


def fits_table() -> None:
    """Whole transcriptomes, and a large query."""
    setting = (
        "Defaults, the choice of lam included. 15,000 / 1,000 genes: {transcriptome:.0f} / {thousand:.0f} seconds."
    )
    table("size", ("thousand", "transcriptome", "superres", "query"), setting)


def growth_table() -> None:
    """Time against the number of locations, and its picture."""
    import matplotlib.pyplot as plt

    rows = [in_own_process("locations", str(n)) for n in LOCATIONS]
    lines = [
        f"| {r['n']:,} | {r['seconds']:.0f} | {r['fit_peak']:.2f} | {r['score']:.4f} | {r['kernel']:.4f} |"
        for r in rows
    ]
    header = "| locations | seconds | peak GB | deviance explained, held-out | kernel |"
    write(
        "growth",
        __file__,
        "Whole brain, 73 genes in situ, defaults: seconds and peak memory of a fit to all locations; scores with a random fifth of them hidden.",
        [header, "|---" * 5 + "|", *lines],
    )
    n, seconds = np.array([r["n"] for r in rows]), np.array([r["seconds"] for r in rows])
    fig, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    ax.loglog(n, seconds, "o-", color="C0", label="measured")
    ax.loglog(n, seconds[-1] * n / n[-1], "--", color="0.6", label="proportional to N")
    ax.set(xlabel="locations", ylabel="seconds, lam chosen", title="73 genes, defaults")
    ax.set_xticks(n, [f"{k:,}" for k in n])
    ax.set_xticks([], minor=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    fig.savefig(ROOT / "docs" / "figures" / "growth.png", dpi=150)


def one_step(n_steps: int = 100) -> dict:
    """Where the time of a step goes, by the profiler's own times of the operations."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from neurst.spatial.data import SpotData
    from neurst.spatial.member import fit_member, start_directions
    from neurst.spatial.observation import Counts
    from neurst.spatial.spec import specify

    adata = small()
    coords, size = adata.obsm["spatial"], adata.obs["total"].to_numpy()
    data = SpotData(coords, sparse.csr_array(adata.X), adata.var_names.to_numpy().astype(str), Counts(size))
    spec = specify(len(coords), penalty="nuclear", device="cpu", steps=n_steps)
    directions = start_directions(data, spec)
    fit = lambda: fit_member(data, spec, spec.penalties[0], spec.networks[0], 100.0, directions, data.box)
    fit()
    begin = time.perf_counter()
    fit()
    plain = (time.perf_counter() - begin) / n_steps
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as trace:
        fit()
    events = trace.key_averages()
    groups = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
        "sine, cosine": ("aten::sin", "aten::cos"),
        "likelihood (exp, products with counts)": ("aten::exp", "aten::dot", "aten::sub_"),
        "optimiser": ("Optimizer.step#Adam.step", "aten::addcdiv_", "aten::addcmul_", "aten::lerp_", "aten::sqrt"),
    }
    total = sum(e.self_cpu_time_total for e in events)
    shares = {k: sum(e.self_cpu_time_total for e in events if e.key in names) / total for k, names in groups.items()}
    shares["the rest: copies, indexing, sums, overhead of calls"] = 1 - sum(shares.values())
    products = [e for e in events if e.key in groups["matrix products"]]
    rate = sum(e.flops for e in products) / sum(e.self_cpu_time_total for e in products) / 1e3
    a, b = torch.randn(4096, 1024), torch.randn(1024, 1024)
    peak = max(_rate(a, b) for _ in range(10))
    return {"shares": shares, "milliseconds": 1e3 * plain, "rate": rate, "peak_rate": peak}


def _rate(a, b) -> float:
    begin = time.perf_counter()
    a @ b
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - begin) / 1e9


def steps_table() -> None:
    """Where the time of a step goes."""
    r = in_own_process("one_step")
    lines = ["| part | share of a step |", "|---|---|", *(f"| {k} | {v:.0%} |" for k, v in r["shares"].items())]
    setting = (
        f"One step of a fit of 3,639 spots x 300 genes (512 spots, 128 regularisation points, sine network 3 x 128): {r['milliseconds']:.1f} ms. Matrix products "
        f"reach {r['rate']:.0f} GFLOP/s, {r['rate'] / r['peak_rate']:.0%} of a large one's {r['peak_rate']:.0f}."
    )
    write("steps", __file__, setting, lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        result = globals()[sys.argv[2]](*sys.argv[3:])
        print(json.dumps(result | {"peak": memory()}))
    else:
        tables = {"speed": speed_table, "fits": fits_table, "growth": growth_table, "steps": steps_table}
        for name in sys.argv[1:] or tables:
            tables[name]()
