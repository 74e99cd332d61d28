"""Writes the short tables of docs/benchmarks.md from the full tables of docs/benchmarks_tables.md.

python benchmarks/summary.py
"""

from __future__ import annotations

from statistics import median

from tables import SUMMARY, TABLES, block, put

Rows = list[dict[str, str]]


def rows(name: str) -> Rows:
    """A full table, one dictionary for each row."""
    lines = [line for line in block(TABLES, name).splitlines() if line.startswith("|")]
    header, _, *body = ([part.strip().strip("*") for part in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, cells, strict=True)) for cells in body]


def best(row: dict[str, str], names: tuple[str, ...]) -> tuple[str, float]:
    """The name and the number of the largest cell."""
    return max(((name, float(row[name])) for name in names if row[name] != "-"), key=lambda pair: pair[1])


def table(header: str, body: list[str]) -> str:
    columns = header.count("|") - 1
    return "\n".join([header, "|---" * columns + "|", *body])


def all_sections() -> str:
    lines = [
        f"| {row['section']} | {row['spots']} | {row['split']} | {row['best simple method']} | **{row['neurst']}** | {row['ratio']} |"
        for row in rows("sections")
    ]
    return table("| section | spots | split | best simple method | neurst | ratio |", lines)


def between_spots() -> str:
    lines = [
        f"| {row['file']} | {row['bins']} | {row['nearest']} | {row['kernel']} | **{row['point']}** |"
        for row in rows("superres-truth")
        if (row["diameter"], row["bin"], row["cells"]) == ("0.55", "1/2", "unseen")
    ]
    return table("| file | bins | nearest spot | kernel | neurst |", lines)


def calibration() -> str:
    found = rows("counts")
    lines = [
        f"| {a['section']} | {a['KS']} | {a['central 90 %']} | {b['KS']} | {b['central 90 %']} |"
        for a, b in zip(found[::2], found[1::2], strict=True)
    ]
    return table("| section | KS, random | central 90 %, random | KS, block | central 90 %, block |", lines)


def choice_of_lam() -> str:
    lines = []
    for split in ("random", "block"):
        for penalty in ("nuclear", "space-variant", "average"):
            shares = [
                float(row["of the best fixed"])
                for row in rows("lam")
                if (row["split"], row["penalty"]) == (split, penalty)
            ]
            lines.append(f"| {split} | {penalty} | {min(shares):.2f} | {median(shares):.2f} | {max(shares):.2f} |")
    return table("| split | penalty | smallest | median | largest |", lines)


def imaging() -> str:
    lines = []

    def line(what: str, measure: str, classical: tuple[str, float], own: str) -> None:
        lines.append(f"| {what} | {measure} | {classical[1]:.2f} ({classical[0]}) | {own} |")

    for noise in ("0.1", "0.2"):
        (mean,) = (row for row in rows("imaging-denoise") if row["case"] == f"all, mean, {noise}")
        line(
            f"18 pictures, noise {noise}, total variation",
            "PSNR, dB",
            best(mean, ("TV", "colour TV", "TGV")),
            mean["neurst"],
        )
        line(f"18 pictures, noise {noise}, patches", "PSNR, dB", best(mean, ("BM3D",)), mean["neurst"])
    (mean,) = (row for row in rows("imaging-inpaint") if row["case"] == "mean")
    names = ("linear", "cubic", "biharmonic", "TV", "colour TV")
    line("6 pictures, a fifth of the entries", "PSNR, dB", best(mean, names), mean["neurst"])
    cubes = rows("imaging-mixed")
    for case in dict.fromkeys(row["case"] for row in cubes):
        scores = {row["method"]: row["psnr"] for row in cubes if row["case"] == case}
        own = scores.pop("neurst")
        line(f"cube, {case}", "PSNR, dB", best(scores, tuple(scores)), own)
    points = {row["method"]: row["others"] for row in rows("imaging-points")}
    line(
        "colours of points without one", "PSNR, dB", best(points, ("nearest k", "kernel", "kriging")), points["neurst"]
    )
    surface = {row["method"]: row["distance"] for row in rows("imaging-surface")}
    others = ("Poisson", "planes, then Poisson", "planes, then ball pivoting")
    name = min(others, key=lambda name: float(surface[name]))
    line(
        "surface of a scan",
        "distance in thousandths of the longest side, less is better",
        (name, float(surface[name])),
        surface["neurst"],
    )
    return table("| what | measure | best classical method | neurst |", lines)


def time_and_memory() -> str:
    measured = rows("speed") + rows("size") + rows("imaging-time")
    lines = [f"| {row['what']} | {row['seconds']} | {row['peak GB of the process']} |" for row in measured]
    largest = rows("growth")[-1]
    lines.append(
        f"| whole brain, {largest['locations']} locations x 73 genes | {largest['seconds']} | {largest['peak GB']} |"
    )
    return table("| what | seconds | peak GB |", lines)


if __name__ == "__main__":
    for make in (all_sections, between_spots, calibration, choice_of_lam, imaging, time_and_memory):
        put(SUMMARY, make.__name__.replace("_", "-"), make())
