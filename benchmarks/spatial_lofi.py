"""Local fields on held-out spots: trained on one section, with other sections that are not registered to it, and on the other sections only.

``NEURST_DATA=folder python benchmarks/spatial_lofi.py [section ...] [--found FILE] [--methods kernel alone with without]`` reads ``spatial/*.h5ad`` of that folder and writes the table "lofi" of
docs/benchmarks_tables.md. FILE (JSON lines) keeps what was found, so that a run can be continued. Held-out spots of the target are used for nothing but the score; the defaults were
chosen on the first section each of st_mouse_hippocampus_4sections, st_her2_patientA, st_mob_4sections, and on starmap_visual_cortex_BY3_1k. The figures of
the field are those of the table "sections" (`benchmarks/spatial_sections.py`): the same genes, splits and scores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from protocol import load, read
from scipy import sparse
from tables import TABLES, block, write

from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.baselines import COUNT_BASELINES
from neurst.spatial.evaluate.scores import deviance_explained
from neurst.spatial.evaluate.splits import split
from neurst.spatial.lofi import LoFiConfig
from neurst.spatial.lofi_fit import fit_lofi
from neurst.spatial.observation import Counts

GENES, MODES, SEEDS = 300, ("random", "block"), (0, 1, 2)
TARGETS = {  # target: files and sections that are trained on with it
    "visium_dlpfc_151673": [("visium_dlpfc_151674", None), ("visium_dlpfc_151510_500g", None)],
    "st_mob_rep11": [("st_mob_4sections", f"MOB{i}") for i in (1, 2, 3, 4)],
}
OTHERS = {
    "st_mouse_hippocampus_4sections, Hippo1": [("st_mouse_hippocampus_4sections", f"Hippo{i}") for i in (2, 3, 4)],
    "st_her2_patientA, A1": [("st_her2_patientA", f"A{i}") for i in (2, 3, 4, 5, 6)],
}  # on which the defaults were chosen
METHODS = ("kernel", "alone", "with", "without")


def target(name: str) -> SpotData:
    """The section that is predicted: its most over-dispersed genes, library sizes over all genes of the file."""
    file, _, section = name.partition(", ")
    coords, counts, size, genes = load(file, GENES, section or None)
    return SpotData(coords, sparse.csr_array(counts.astype(np.float32)), genes.astype(str), Counts(size))


def other(file: str, section: str | None, genes: np.ndarray) -> SpotData:
    """Another section with those of the genes that it has."""
    adata = read(file)
    if section is not None:
        adata = adata[adata.obs["section"].astype(str) == section]
    columns = [adata.var_names.to_series(), *([adata.var["symbol"].astype(str)] if "symbol" in adata.var else [])]
    names = max(columns, key=lambda column: column.isin(genes).sum())
    size, chosen = np.asarray(adata.X.sum(1), dtype=float).ravel(), (names.isin(genes) & ~names.duplicated()).to_numpy()
    keep, shared = size > 20, names.to_numpy().astype(str)[chosen]
    values = sparse.csr_array(adata.X)[keep][:, chosen]
    return SpotData(np.asarray(adata.obsm["spatial"], float)[keep, :2], values, shared, Counts(size[keep]))


def trained(sections: list[SpotData], seed: int):
    """A local field with the defaults, and the CPU seconds of its training."""
    begin = time.process_time()
    model = fit_lofi(sections, LoFiConfig(), random_state=seed, device="cpu")
    return model, time.process_time() - begin


def rows(name: str, method: str) -> list[dict]:
    """Scores of a method on every split of a target."""
    data = target(name)
    others = [other(*which, data.genes) for which in (TARGETS | OTHERS)[name]]
    foreign = trained(others, 0) if method == "without" else None  # no split changes it
    found = []
    for mode in MODES:
        for seed in SEEDS:
            train, test = (data.take(index) for index in split(data.coords, mode, random_state=seed))
            if method == "kernel":
                rate, seconds = COUNT_BASELINES["kernel"](train, test), np.nan
            else:
                model, seconds = foreign or trained([train, *(others if method == "with" else [])], seed)
                rate = predicted(model, train, test)
            score = deviance_explained(test.values, test.observation.size, rate, train.mean_rate())
            print(name, method, mode, seed, round(score, 4), round(seconds, 1), flush=True)
            found.append(
                {"target": name, "method": method, "mode": mode, "seed": seed, "score": score, "seconds": seconds}
            )
    return found


def predicted(model, train: SpotData, test: SpotData) -> np.ndarray:
    """Rates at the hidden spots; genes that the model does not know get their mean rate."""
    known = np.flatnonzero(np.isin(train.genes, model.genes))
    rate = np.tile(train.mean_rate(), (len(test.coords), 1))
    rate[:, known] = model.rates(train.take_genes(known), test.coords)
    return rate


def field(name: str, mode: str) -> list[float]:
    """Scores of the field for each seed, from the table of all sections."""
    for line in block(TABLES, "sections").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == name and cells[2] == mode:
            return [float(value) for value in cells[6].split("/")]
    msg = f"{name!r}, {mode!r} is not in the table: run benchmarks/spatial_sections.py first"
    raise LookupError(msg)


def shown(scores: list[float]) -> str:
    """The mean and each value."""
    return f"{np.mean(scores):.4f} ({' / '.join(f'{score:.3f}' for score in scores)})"


def table(found: list[dict]) -> list[str]:
    """One line for each target and split."""
    head = (
        "section",
        "split",
        "kernel",
        "field (`neurtv_fit`)",
        "**local field**, alone",
        "**with other sections**",
        "without the section",
        "seconds",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row["target"] for row in found):
        for mode in MODES:
            here = {m: [r for r in found if (r["target"], r["method"], r["mode"]) == (name, m, mode)] for m in METHODS}
            cells = {m: shown([row["score"] for row in part]) if part else "-" for m, part in here.items()}
            seconds = " / ".join(
                f"{np.mean([r['seconds'] for r in here[m]]):.0f}" if here[m] else "-" for m in METHODS[1:]
            )
            line = (name, mode, cells["kernel"], shown(field(name, mode)), *(cells[m] for m in METHODS[1:]), seconds)
            lines.append("| " + " | ".join(line) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--found", type=Path, default=Path("lofi.jsonl"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("sections", nargs="*", default=[*TARGETS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [json.loads(line) for line in arguments.found.read_text().splitlines()] if arguments.found.exists() else []
    for name in arguments.sections:
        for method in arguments.methods:
            if any((row["target"], row["method"]) == (name, method) for row in found):
                continue
            new = rows(name, method)
            found += new
            with arguments.found.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            print(
                name,
                method,
                {mode: shown([r["score"] for r in new if r["mode"] == mode]) for mode in MODES},
                flush=True,
            )
    setting = (
        f"Deviance explained on held-out spots by local fields with their defaults, {GENES} genes, mean and each of the seeds 0, 1, 2. Other sections are not registered and may lack genes: "
        f"{'; '.join(f'{name}: ' + ', '.join(part or file for file, part in files) for name, files in TARGETS.items())}. Without the section: the model has not seen it, "
        "and predicts its hidden spots from its other spots. CPU seconds of a training: alone / with / without."
    )
    write("lofi", __file__, setting, table(found))


if __name__ == "__main__":
    main()
