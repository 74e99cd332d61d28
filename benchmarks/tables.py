"""Writes what a benchmark found into docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import neurst

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
HEADER = "# Benchmarks\n\nEach table is written by the script it names, which first checks that the answers agree.\n"


def cpu() -> str:
    """Model of the processor and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def write(name: str, script: str, setting: str, lines: list[str]) -> None:
    """Put `setting`, a table and where it comes from between the markers of `name`; the page is made if missing."""
    source = (
        f"`{Path(script).relative_to(ROOT).as_posix()}`, neurst {getattr(neurst, '__version__', 'unreleased')}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads on {cpu()}."
    )
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = "\n".join([begin, setting, "", *lines, "", source, end])
    page = PAGE.read_text() if PAGE.exists() else HEADER
    if begin in page:
        before, rest = page.split(begin, 1)
        page = before + block + rest.split(end, 1)[1]
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    PAGE.write_text(page)
