"""How well held-out spots of real sections are predicted: the field with its defaults, and what else one could use.

``NEURST_DATA=folder python benchmarks/spatial_holdout.py [methods] [counts] [penalties] [learned] [lam]`` reads ``spatial/*.h5ad`` of that folder and writes
the tables named (all five if none is) of docs/benchmarks_tables.md. Every method runs in a process of its own for each section,
so that its peak memory can be told. Sections, genes, splits and scores are those of the tests.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from functools import partial

import numpy as np
from anndata import AnnData
from protocol import load, read
from scipy import sparse
from scipy.stats import nbinom
from tables import write

import neurst
from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.baselines import COUNT_BASELINES, log_normalised, rate_of_logs
from neurst.spatial.evaluate.calibration import calibration, randomised_pit
from neurst.spatial.evaluate.scores import deviance_explained, median_log_rate_correlation
from neurst.spatial.evaluate.splits import split
from neurst.spatial.fit import fit_tuned
from neurst.spatial.observation import Counts
from neurst.spatial.spec import specify
from neurst.spatial.tune import Tuning

SECTIONS = {  # file: genes, first value of obs["section"] (None: the file is one section)
    "visium_dlpfc_151673": (300, False),
    "visium_dlpfc_151674": (300, False),
    "st_mob_rep11": (300, False),
    "st_mouse_hippocampus_4sections": (300, True),
    "slideseqv2_hippocampus_dentate_1052": (200, False),
    "starmap_visual_cortex_BY3_1k": (200, False),
    "merfish_motor_cortex_gaston": (150, False),
    "st_her2_patientA": (300, True),
    "osmfish_sscortex": (33, False),
    # 522 of its positions occur twice in the file, with the same counts
    "osmfish_sscortex, each position once": (33, False),
}
MODES = ("random", "block")
LEFT = {"score": ".4f", "pairs": ".0f", "shared": ".3f", "libraries": ".4f"}
TOO_MANY_SPOTS = {
    "kriging": ("osmfish_sscortex", "osmfish_sscortex, each position once"),  # an N x N matrix
    "kriging_log": ("osmfish_sscortex", "osmfish_sscortex, each position once"),
    "smoother": (  # over ten minutes a split
        "visium_dlpfc_151673",
        "visium_dlpfc_151674",
        "osmfish_sscortex",
        "osmfish_sscortex, each position once",
    ),
}
SEEDS = (0, 1, 2)
LAMS = [20.0, 60.0, 180.0, 540.0, 1620.0, 4860.0]
PENALTIES = ("nuclear", "space_variant", "isotropic", "hessian", "tgv")
LEARNED_SECTIONS = (  # of different platforms
    "st_mob_rep11",
    "st_mouse_hippocampus_4sections",
    "slideseqv2_hippocampus_dentate_1052",
)
LEARNED = ("tgv", "learned_tgv", "space_variant")  # compared on three seeds
PENALTY = {"nuclear": "nuclear", "space_variant": "space-variant", "auto": "average"}


def section(name: str) -> AnnData:
    """A section as a user would hold it, the total over all genes of the file in `obs`."""
    n_genes, several = SECTIONS[name]
    file, _, once = name.partition(", ")
    first = str(read(file).obs["section"].iloc[0]) if several else None
    coords, counts, size, genes = load(file, n_genes, first)
    if once:
        kept = np.sort(np.unique(coords, axis=0, return_index=True)[1])
        coords, counts, size = coords[kept], counts[kept], size[kept]
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    adata.var_names, adata.obsm["spatial"], adata.obs["total"] = genes, coords, size
    return adata


def field_rates(train: AnnData, hidden: AnnData, **options) -> tuple:
    """Rates of the fitted field, the strengths chosen, and how uniform the transformed held-out counts are."""
    neurst.tl.neurtv_fit(train, size_factors="total", progress=False, **options)
    slot, field = train.uns["neurtv"], neurst.get.field(train)
    coords, size, counts = hidden.obsm["spatial"], hidden.obs["total"].to_numpy(), hidden.X.toarray().astype(float)
    rate = field(coords) / field.target_sum
    phi = train.var["neurtv_dispersion"].to_numpy()
    mean = np.maximum(size[:, None] * rate, 1e-8)
    distance, share = calibration(randomised_pit(counts, mean, phi))
    theta = 1 / np.maximum(phi, 1e-9)
    nats = -nbinom.logpmf(counts, theta, theta / (theta + mean)).mean()
    more = {"weights": slot["member_weights"], "ks": distance, "central": share, "nats": nats}
    more |= left_over(train, coords, size, counts, rate)
    return rate, {"lam": slot["lam"], **more}


def left_over(train: AnnData, coords: np.ndarray, size: np.ndarray, counts: np.ndarray, rate: np.ndarray) -> dict:
    """What a field leaves of hidden counts beyond Poisson noise: whether it is shared by adjacent spots, or told by a spot's own library.

    ``shared`` is the covariance between adjacent hidden spots over the variance beyond Poisson's, over genes together; ``libraries`` the
    score with a further slope for each gene, learnt from the training spots, on how far a spot's log library lies from its neighbours'.
    """
    from scipy.spatial import cKDTree

    mean, tree = size[:, None] * rate, cKDTree(train.obsm["spatial"])
    residual = (counts - mean) / np.sqrt(np.maximum(mean.mean(0), 1e-9))
    beyond = ((residual**2).mean(0) - 1).sum()
    spacing = np.median(tree.query(train.obsm["spatial"], k=2)[0][:, 1])
    i, j = cKDTree(coords).query_pairs(1.5 * spacing, output_type="ndarray").T
    shared = (residual[i] * residual[j]).mean(0).sum() / beyond

    own, field = np.log(train.obs["total"].to_numpy()), neurst.get.field(train)
    deviation = np.log(size) - own[tree.query(coords, k=12)[1]].mean(1)
    deviation_train = own - own[tree.query(train.obsm["spatial"], k=13)[1][:, 1:]].mean(1)
    fitted = np.exp(own)[:, None] * field(train.obsm["spatial"]) / field.target_sum
    values, slope = train.X.toarray(), np.zeros(counts.shape[1])
    for _ in range(10):  # Newton's steps, one number for each gene
        now = fitted * np.exp(np.outer(deviation_train, slope))
        slope += deviation_train @ (values - now) / np.maximum(deviation_train**2 @ now, 1e-9)
    null = np.asarray(train.X.sum(0)).ravel() / train.obs["total"].sum()
    sized = deviance_explained(counts, size, rate * np.exp(np.outer(deviation, slope)), null)
    return {"shared": shared, "pairs": len(i), "libraries": sized}


def log_normal_rates(train: AnnData, hidden: AnnData) -> tuple:
    """Rates of the same network and prior fitted to log-normalised values."""
    size = train.obs["total"].to_numpy()
    logs = train.copy()
    logs.X = log_normalised(sparse.csr_array(train.X), size)
    neurst.tl.neurtv_fit(logs, likelihood="gaussian", progress=False)
    rate = np.asarray(train.X.sum(0)).ravel() / size.sum()
    return rate_of_logs(neurst.get.field(logs)(hidden.obsm["spatial"]), rate), {}


def spots(adata: AnnData) -> SpotData:
    """The counts of a section with the library sizes of the whole file."""
    size, genes = adata.obs["total"].to_numpy(), adata.var_names.to_numpy().astype(str)
    return SpotData(adata.obsm["spatial"], sparse.csr_array(adata.X), genes, Counts(size))


def baseline_rates(name: str, train: AnnData, hidden: AnnData, *_, **__) -> tuple:
    """Rates of a baseline."""
    return COUNT_BASELINES[name](spots(train), spots(hidden)), {}


METHODS = {
    **{name: partial(baseline_rates, name) for name in ("nearest", "kernel", "kriging", "kriging_log", "smoother")},
    "no TV": partial(field_rates, lam=0.0, penalty="isotropic", n_members=1),
    "log-normalised": log_normal_rates,
    "neurst": field_rates,
    "negative binomial": partial(field_rates, likelihood="negative_binomial"),
    **{name: partial(field_rates, penalty=name, n_members=1) for name in dict.fromkeys(PENALTIES + LEARNED)},
}
EVERY_SEED = ("nearest", "kernel", "neurst")  # of the first table; the others are run for seed 0 only


def score(name: str, method: str, *seeds: str) -> list[dict]:
    """Every split of a section, predicted by one method."""
    adata, rows = section(name), []
    for mode in MODES:
        for seed in map(int, seeds):
            train, test = split(adata.obsm["spatial"], mode, random_state=seed)
            part, hidden = adata[train].copy(), adata[test]
            counts, size = hidden.X.toarray().astype(float), hidden.obs["total"].to_numpy()
            null = np.asarray(part.X.sum(0)).ravel() / part.obs["total"].sum()
            begin = time.perf_counter()
            rate, more = METHODS[method](part, hidden)
            seconds = time.perf_counter() - begin
            rows.append(
                {
                    "mode": mode,
                    "seed": seed,
                    "score": deviance_explained(counts, size, rate, null),
                    "r": median_log_rate_correlation(counts, size, rate),
                    "seconds": seconds,
                    **more,
                }
            )
    return rows


def in_own_process(function: str, *arguments: str) -> dict:
    """What a function of this file finds in a new process, and that process's peak memory in GB."""
    command = [sys.executable, "-W", "ignore", __file__, "--call", function, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def found(name: str, methods: list[str], every_seed: tuple[str, ...] = ()) -> dict[tuple, dict]:
    """Rows of a section by method, mode and seed; seed 0 only, but for the methods that are run for every seed."""
    rows = {}
    for method in methods:
        if name in TOO_MANY_SPOTS.get(method, ()):
            continue
        seeds = SEEDS if method in every_seed else SEEDS[:1]
        result = in_own_process("score", name, method, *map(str, seeds))
        for row in result["rows"]:
            rows[method, row["mode"], row["seed"]] = row | {"peak": result["peak"]}
        shown = {(row["mode"], row["seed"]): round(row["score"], 4) for row in result["rows"]}
        print(name, method, shown, flush=True)
    return rows


def cell(rows: dict, method: str, mode: str, what: str = "score", form: str = ".4f", seeds: tuple = SEEDS[:1]) -> str:
    """The mean over seeds, if all were run."""
    keys = [(method, mode, seed) for seed in seeds]
    known = all(key in rows for key in keys)
    return format(np.mean([rows[key][what] for key in keys]), form) if known else "-"


def methods_tables() -> None:
    """The field with its defaults beside everything else."""
    names = [name for name in METHODS if name not in (*PENALTIES, "negative binomial")]
    simple = ["nearest", "kernel", "kriging", "kriging_log", "smoother"]
    scores, means, costs, left = [], [], [], []
    for name, (genes, _) in SECTIONS.items():
        rows = found(name, names, EVERY_SEED)
        for mode in MODES:
            base = [rows[m, mode, 0]["score"] for m in simple if (m, mode, 0) in rows]
            ratio = rows["neurst", mode, 0]["score"] / max(base)
            cells = [cell(rows, m, mode) for m in (*simple, "no TV", "log-normalised")]
            cells += [f"**{cell(rows, 'neurst', mode)}**", f"{ratio:.2f}"]
            scores.append(f"| {name} | {genes} | {mode} | {' | '.join(cells)} |")
            means_of = [cell(rows, m, mode, seeds=SEEDS) for m in EVERY_SEED]
            r = [cell(rows, m, mode, "r", ".3f") for m in ("kernel", "kriging", "kriging_log", "neurst")]
            means.append(f"| {name} | {mode} | {' | '.join(means_of + r)} |")
            cost = [cell(rows, m, mode, "seconds", ".0f") for m in ("kernel", "kriging", "smoother", "neurst")]
            cost += [cell(rows, m, mode, "peak", ".2f") for m in ("kernel", "kriging", "smoother", "neurst")]
            lam = ", ".join(f"{k.replace('_', '-')} {v:.0f}" for k, v in rows["neurst", mode, 0]["lam"].items())
            costs.append(f"| {name} | {mode} | {' | '.join(cost)} | {lam} |")
        more = [cell(rows, "neurst", "random", w, form) for w, form in LEFT.items()]
        left.append(f"| {name} | {' | '.join(more)} |")
        write(
            "held-out",
            __file__,
            "Poisson deviance explained on held-out spots, seed 0, defaults; the last column is neurst over the best of the baselines to "
            "the left of `no TV`, which is the same network without a penalty; `log-normalised` is neurst on log1p-normalised values. Kriging is not run on over 4,500 spots, nor Smoother on over 2,000.",
            ["| section | genes | split | nearest | kernel | kriging | kriging, logs | Smoother | no TV | log-normalised | **neurst** "
             "| ratio |", "|---" * 12 + "|", *scores],
        )  # fmt: skip
        write(
            "held-out-seeds",
            __file__,
            "The same, means over seeds 0, 1 and 2; and the median over genes of Pearson's r of log rates, seed 0.",
            ["| section | split | nearest | kernel | **neurst** | r, kernel | r, kriging | r, kriging of logs | r, neurst |",
             "|---" * 9 + "|", *means],
        )  # fmt: skip
        write(
            "held-out-cost",
            __file__,
            "Seconds of each method (for neurst: both penalties, the choice of lam and the average), peak memory of its process in GB, and the "
            "strengths chosen; seed 0.",
            ["| section | split | s, kernel | s, kriging | s, Smoother | s, neurst | GB, kernel | GB, kriging | GB, Smoother | GB, neurst "
             "| lam |", "|---" * 11 + "|", *costs],
        )  # fmt: skip
        write(
            "left-over",
            __file__,
            "What the field leaves on random rows, seed 0: pairs of adjacent hidden spots, the share of the variance beyond Poisson noise that the two have "
            "in common, and the score once a slope for each gene, learnt from the training spots, follows how far a spot's own library lies from its "
            "neighbours'.",
            ["| section | score | pairs | shared | score with libraries |", "|---" * 5 + "|", *left],
        )


def counts_table() -> None:
    """Poisson and negative binomial likelihoods, and calibration."""
    lines, both = [], ("neurst", "negative binomial")
    for name in SECTIONS:
        rows = found(name, list(both))
        for mode in MODES:
            cells = [cell(rows, method, mode) for method in both]
            cells += [cell(rows, method, mode, "nats", ".4f") for method in both]
            cells += [cell(rows, "neurst", mode, what, ".3f") for what in ("ks", "central")]
            lines.append(f"| {name} | {mode} | {' | '.join(cells)} |")
        write(
            "counts",
            __file__,
            "Likelihoods and calibration, seed 0. Deviance explained and held-out negative log-likelihood per count (negative binomial with the "
            "dispersion of each gene, nats) of a Poisson and of a negative binomial fit; then, for the Poisson fit, the Kolmogorov-Smirnov distance of the randomised "
            "probability integral transform from uniform and the share of counts in its central 90 %.",
            ["| section | split | Poisson | negative binomial | nats, Poisson | nats, negative binomial | KS | central 90 % "
             "|", "|---" * 8 + "|", *lines],
        )  # fmt: skip


def penalties_table() -> None:
    """Each penalty alone, its strength chosen; and their average."""
    lines = []
    for name in SECTIONS:
        rows = found(name, ["no TV", *PENALTIES])
        for mode in MODES:
            lines.append(f"| {name} | {mode} | {' | '.join(cell(rows, m, mode) for m in ('no TV', *PENALTIES))} |")
        header = ["no penalty", *(p.replace("_", "-") for p in PENALTIES)]
        write(
            "penalties",
            __file__,
            "One member under one penalty each, lam chosen; the default (above) averages nuclear, space-variant, a Gaussian process and the constant. Deviance explained, seed 0.",
            [f"| section | split | {' | '.join(header)} |", "|---" * (2 + len(header)) + "|", *lines],
        )


def learned_table() -> None:
    """Total generalised variation with constant weights, and with weights that a network predicts."""
    lines = []
    for name in LEARNED_SECTIONS:
        rows = found(name, list(LEARNED), every_seed=LEARNED)
        for mode in MODES:
            means = [float(cell(rows, m, mode, form=".6f", seeds=SEEDS)) for m in LEARNED]
            each = " / ".join(
                f"{rows['learned_tgv', mode, s]['score'] - rows['tgv', mode, s]['score']:+.4f}" for s in SEEDS
            )
            cells = " | ".join(f"{mean:.4f}" for mean in means)
            lines.append(f"| {name} | {mode} | {cells} | {means[1] - means[0]:+.4f} ({each}) |")
        header = [m.replace("_", "-") for m in LEARNED]
        write(
            "learned",
            __file__,
            "One member under one penalty each, lam chosen. Deviance explained, means over seeds 0, 1, 2; and the gain of learned-tgv over tgv (each seed).",
            [f"| section | split | {' | '.join(header)} | gain |", "|---" * (3 + len(header)) + "|", *lines],
        )


def lam_row(name: str) -> list[dict]:
    """Scores of a member at fixed strengths and at the one that the training spots choose."""
    rows = []
    for mode in MODES:
        adata = section(name)
        train, test = split(adata.obsm["spatial"], mode, random_state=0)
        part, hidden = adata[train].copy(), adata[test]
        counts, size = hidden.X.toarray().astype(float), hidden.obs["total"].to_numpy()
        null = np.asarray(part.X.sum(0)).ravel() / part.obs["total"].sum()
        score_of, pair = partial(_explained, counts, size, null), PENALTIES[:2]
        fixed = {p: [_fixed(part, hidden, p, lam) for lam in LAMS] for p in pair}
        scores = {p: [score_of(rate) for rate in fixed[p]] for p in pair}
        both = np.array([[score_of(np.sqrt(a * b)) for b in fixed[pair[1]]] for a in fixed[pair[0]]])
        best = {p: (p, LAMS[np.argmax(scores[p])]) for p in pair}
        again = {p: _fixed(part, hidden, *best[p], random_state=1) for p in pair}
        scores["auto"] = both.max(1).tolist()
        i, j = np.unravel_index(both.argmax(), both.shape)
        ends = [(p, LAMS[k]) for p, k in zip(pair, (i, j), strict=True)]
        again["auto"] = np.sqrt(np.prod([_fixed(part, hidden, *end, random_state=1) for end in ends], axis=0))
        for penalty, found in scores.items():
            single = {} if penalty == "auto" else {"n_members": 1}
            options = {"penalty": pair if penalty == "auto" else penalty} | single
            rate, more = field_rates(part.copy(), hidden, **options)
            row = {"mode": mode, "penalty": penalty, "lam": " and ".join(f"{v:.0f}" for v in more["lam"].values())}
            rows.append(row | {"own": score_of(rate), "fixed": found, "again": score_of(again[penalty])})
    return rows


def _explained(counts: np.ndarray, size: np.ndarray, null: np.ndarray, rate: np.ndarray) -> float:
    return deviance_explained(counts, size, rate, null)


def _fixed(part: AnnData, hidden: AnnData, penalty: str, lam: float, random_state: int = 0) -> np.ndarray:
    """Rates of one member at a given strength, fitted to all spots that are not hidden."""
    data = spots(part)
    spec = specify(len(data.coords), penalty=penalty, lam=lam, n_members=1, random_state=random_state)
    given = Tuning(np.array([lam]), np.ones(1), {}, 0.0, np.zeros(len(data.genes)), None)
    return fit_tuned(data, spec, given, target_sum=1.0).field(hidden.obsm["spatial"])


def lam_table() -> None:
    """The choice of lam against an oracle that sees the held-out spots."""
    lines = []
    for name in SECTIONS:
        for r in in_own_process("lam_row", name)["rows"]:
            of_best, of_again = r["own"] / max(r["fixed"]), r["own"] / r["again"]
            cells = " | ".join(f"{f:.4f}" for f in r["fixed"])
            lines.append(
                f"| {name} | {r['mode']} | {PENALTY[r['penalty']]} | {cells} | {r['lam']} | {r['own']:.4f} | {of_best:.3f} | {of_again:.3f} |"
            )
            print(lines[-1], flush=True)
        write(
            "lam",
            __file__,
            "Deviance explained at fixed strengths, the held-out spots looked at, and at the strengths chosen without them; seed 0. One member under one penalty; and the average of both, at fixed strengths with equal "
            "weights: nuclear at that of the column, space-variant at the best of the six. The last columns are the chosen over the best fixed score, and over "
            "that of the same strengths fitted anew from another seed, which no longer is the largest of many.",
            [f"| section | split | penalty | {' | '.join(f'{lam:.0f}' for lam in LAMS)} | lam chosen | score | of the best fixed | of it refitted |",
             "|---" * (7 + len(LAMS)) + "|", *lines],
        )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        rows = {"score": score, "lam_row": lam_row}[sys.argv[2]](*sys.argv[3:])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"rows": rows, "peak": peak}))
    else:
        tables = {
            "methods": methods_tables,
            "counts": counts_table,
            "penalties": penalties_table,
            "learned": learned_table,
            "lam": lam_table,
        }
        for table in sys.argv[1:] or tables:
            tables[table]()
