"""Writes what a benchmark found into the pages of the docs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import neurst

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "docs" / "benchmarks_tables.md"
SUMMARY = ROOT / "docs" / "benchmarks.md"


def cpu() -> str:
    """Model of the processor and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def block(page: Path, name: str) -> str:
    """What stands between the markers of `name` on a page."""
    return page.read_text().split(f"<!-- {name} -->\n", 1)[1].split(f"\n<!-- /{name} -->", 1)[0]


def put(page: Path, name: str, text: str) -> None:
    """Put a text between the markers of `name` on a page, or at its end if it has no such markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = page.read_text()
    if begin not in content:
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n"
    before, rest = content.split(begin, 1)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def write(name: str, script: str, setting: str, lines: list[str]) -> None:
    """Put `setting`, a table and where it comes from into the page of all tables."""
    source = (
        f"`{Path(script).relative_to(ROOT).as_posix()}`, neurst {getattr(neurst, '__version__', 'unreleased')}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads on {cpu()}."
    )
    put(TABLES, name, "\n".join([setting, "", *lines, "", source]))
