"""Is the default field ever behind a simple method? Every section at hand, single spots and discs hidden, seeds 0 to 2, defaults.

``NEURST_DATA=folder python benchmarks/spatial_sections.py [--found FILE] [--seeds 0,1,2] [name part ...]`` reads ``spatial/*.h5ad`` of that folder and
writes the tables "sections" and "shuffled" of docs/benchmarks_tables.md. FILE (JSON lines) keeps what was found, so that a run can be
continued. Each row is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from protocol import load, read
from scipy import sparse
from tables import write

from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.baselines import COUNT_BASELINES
from neurst.spatial.evaluate.kriging import MOST_SPOTS
from neurst.spatial.evaluate.scores import deviance_explained
from neurst.spatial.evaluate.splits import split
from neurst.spatial.fit import fit_expression
from neurst.spatial.observation import Counts
from neurst.spatial.spec import specify

FILES = {  # file: genes, column of the sections (None: the file is one section)
    "visium_dlpfc_151673": (300, None),
    "visium_dlpfc_151674": (300, None),
    "visium_dlpfc_151510_500g": (300, None),
    "visium_lymph_1000spots": (300, None),
    "visium_mouse_section_he": (300, None),
    "visium_prostate_NP_AC_mini": (300, "sample"),
    "st_mob_rep11": (300, None),
    "st_mob_4sections": (300, "section"),
    "st_mouse_hippocampus_4sections": (300, "section"),
    "st_her2_patientA": (300, "section"),
    "st_her2_patientE": (300, "section"),
    "st_her2_patientG": (300, "section"),
    "slideseqv2_hippocampus_dentate_1052": (200, None),
    "starmap_visual_cortex_BY3_1k": (200, None),
    "starmap_mpfc_3sections": (150, "section"),
    "merfish_motor_cortex_gaston": (150, None),
    "osmfish_sscortex": (33, None),
}
SHUFFLED = ("st_mob_rep11", "visium_dlpfc_151673", "merfish_motor_cortex_gaston")
MODES, SIMPLE = ("random", "block"), ("nearest", "kernel", "kriging", "kriging_log")


def sections() -> list[tuple[str, str]]:
    """File and section of all sections."""
    return [
        (file, name)
        for file, (_, column) in FILES.items()
        for name in ([""] if column is None else dict.fromkeys(read(file).obs[column].astype(str)))
    ]


def spots(file: str, section: str, *, shuffled: bool = False) -> SpotData:
    """The counts of a section, with library sizes over all genes of the file; positions shuffled among spots if asked for."""
    n_genes, column = FILES[file]
    coords, counts, size, genes = load(file, n_genes, section or None, column or "section")
    if shuffled:
        coords = coords[np.random.default_rng(7).permutation(len(coords))]
    return SpotData(coords, sparse.csr_array(counts.astype(np.float32)), np.asarray(genes).astype(str), Counts(size))


def row(file: str, section: str, mode: str, seed: str, shuffled: str) -> dict:
    """Scores of the field and of the simple methods on one split."""
    data = spots(file, section, shuffled=shuffled == "True")
    train, test = (data.take(index) for index in split(data.coords, mode, random_state=int(seed)))
    mean = train.mean_rate()
    score = lambda rate: deviance_explained(test.values, test.observation.size, rate, mean)
    names = [name for name in SIMPLE if "kriging" not in name or len(train.coords) <= MOST_SPOTS]
    found = {name: score(COUNT_BASELINES[name](train, test)) for name in names}
    begin = time.perf_counter()
    result = fit_expression(train, specify(*train.coords.shape, random_state=int(seed)), target_sum=1.0)
    found["field"], tuning = score(result.field(test.coords)), result.tuning
    names = [candidate.name for candidate in specify(*train.coords.shape).candidates()]
    weights = dict(zip(names, tuning.weights.tolist(), strict=True)) | {"constant": tuning.constant}
    trusted = float(np.mean(tuning.gene_scores > 0.01))
    return {
        "seconds": time.perf_counter() - begin,
        "spots": len(data.coords),
        "scores": found,
        "weights": weights,
        "trusted": trusted,
    }


def ask(key: list[str]) -> dict:
    """:func:`row` in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--call", *key]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def tables(found: dict[tuple, dict], seeds: list[int]) -> None:
    """Means over seeds, and the ratio of the means."""
    lines, ratios = [], []
    for file, section in sections():
        for mode in MODES:
            rows = [found.get((file, section, mode, str(seed), "False")) for seed in seeds]
            if None in rows:
                continue
            means = {name: np.mean([row["scores"][name] for row in rows]) for name in rows[0]["scores"]}
            best = max((name for name in means if name != "field"), key=means.get)
            ratios.append(means["field"] / means[best])
            each = " / ".join(f"{row['scores']['field']:.3f}" for row in rows)
            weights = ", ".join(
                f"{name.replace('_', ' ')} {share:.2f}"
                for name in rows[0]["weights"]
                if (share := np.mean([row["weights"].get(name, 0.0) for row in rows])) >= 0.005
            )
            name = f"{file}, {section}" if section else file
            lines.append(
                f"| {name} | {rows[0]['spots']} | {mode} | {means[best]:.4f} ({best}) | **{means['field']:.4f}** | {ratios[-1]:.3f} | {each} | {weights} |"
            )
    header = [
        "| section | spots | split | best simple method | **neurst** | ratio | neurst, each seed | weights |",
        "|---" * 8 + "|",
    ]
    if lines:
        setting = (
            f"Deviance explained on held-out spots, means over seeds {', '.join(map(str, seeds))}, defaults, {len(lines)} rows. Ratio to the best of nearest spot, kernel "
            f"and both krigings: at least {min(ratios):.3f}, {np.mean(ratios):.3f} in the mean. Weights of the members: means over seeds."
        )
        write("sections", __file__, setting, [*header, *lines])
    lines = []
    for file in SHUFFLED:
        for mode in MODES:
            rows = [found.get((file, "", mode, str(seed), "True")) for seed in seeds]
            if None in rows:
                continue
            field = " / ".join(f"{row['scores']['field']:.4f}" for row in rows)
            simple = " / ".join(f"{max(v for k, v in row['scores'].items() if k != 'field'):.4f}" for row in rows)
            lines.append(f"| {file} | {mode} | {field} | {simple} | {np.mean([row['trusted'] for row in rows]):.3f} |")
    if lines:
        setting = "Positions shuffled among the spots, so that there is nothing to find: deviance explained for each seed, and the share of genes whose `var` score is above 0.01."
        write(
            "shuffled",
            __file__,
            setting,
            ["| section | split | neurst | best simple method | genes above 0.01 |", "|---" * 5 + "|", *lines],
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--found", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    found, seeds = {}, [int(seed) for seed in options.seeds.split(",")]
    if options.found and options.found.exists():
        lines = map(json.loads, options.found.read_text().splitlines())
        found = {tuple(line["key"]): line["row"] for line in lines}
    for seed in seeds:
        asked = [(f, s, m, str(seed), "False") for f, s in sections() for m in MODES]
        asked += [(f, "", m, str(seed), "True") for f in SHUFFLED for m in MODES]
        for key in asked:
            if key in found or (options.names and not any(part in " ".join(key) for part in options.names)):
                continue
            found[key] = ask(list(key))
            scores = {name: round(score, 4) for name, score in found[key]["scores"].items()}
            print(*key, scores, f"{found[key]['seconds']:.0f} s", flush=True)
            if options.found:
                with options.found.open("a") as file:
                    file.write(json.dumps({"key": key, "row": found[key]}) + "\n")
    tables(found, seeds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        print(json.dumps(row(*sys.argv[2:])))
    else:
        main()
