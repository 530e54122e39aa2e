"""What a part of the benchmark is given, what it gives back, and where that is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfsp.tables.markdown_line import line


@dataclass(frozen=True)
class Settings:
    """The checked command line.

    windows: calibration sets of the part calibration, in windows of 512 tokens; blocks, modes and runs: of the part
    streaming; dtypes: on a CPU (a GPU runs bfloat16).
    """

    repeats: int = 5
    work: Path = Path("outputs/benchmark")
    results: Path = Path("results")
    device: str = "auto"
    shapes: tuple[str, ...] = ("small", "large")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    windows: tuple[int, ...] = (8, 64)
    blocks: int = 58
    modes: tuple[str, ...] = ("off", "on")
    runs: int = 3


@dataclass(frozen=True)
class Check:
    """A figure that must hold: at most the limit, or (``at_least``) at least it."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """NaN meets nothing."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{self.name}: {self.value:.4g}, must be {bound} {self.limit:.4g}"


@dataclass
class Found:
    """What a part measured: ``rows`` for its table, and what must hold of them.

    name: of its files; ``words``: of the command line that measures it; ``script``: of that command line.
    """

    name: str
    words: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    script: str = "benchmark.py"

    @property
    def made_by(self) -> str:
        return f"python scripts/{self.script} {self.words}".rstrip()


def write(found: Found, table: str, settings: Settings) -> None:
    """The record results/benchmarks/PART.json and the table results/tables/benchmark_PART.md."""
    from cfsp.record import environment

    checks = [{**asdict(check), "met": check.met} for check in found.checks]
    record = {
        "part": found.name,
        "made_by": found.made_by,
        "repeats": settings.repeats,
        **found.notes,
        "rows": found.rows,
        "checks": checks,
        "environment": environment.describe(),
    }
    for path, content in (
        (settings.results / "benchmarks" / f"{found.name}.json", json.dumps(record, indent=2) + "\n"),
        (settings.results / "tables" / f"benchmark_{found.name}.md", table),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], found: Found, explained: str) -> str:
    """A table with what it shows, what must hold of it, and where it was measured. The first column is text."""
    from cfsp.record import environment

    here = environment.describe()
    packages, git = here["packages"], here["git"] or {"commit": "an installed wheel", "dirty": False}
    gpus = f", {', '.join(here['gpus'])}" if here["gpus"] else ""
    lines = [f"### {title}", "", line(head), line(["---", *["--:"] * (len(head) - 1)]), *(line(row) for row in rows)]
    if found.checks:
        lines += ["", *(f"- {'holds' if check.met else '**MISSED**'}: {check}" for check in found.checks)]
    lines += [
        "",
        f"{explained}  ",
        f"Commit: {git['commit'][:12]}{'+changes' if git['dirty'] else ''}. torch {packages['torch']}, transformers "
        f"{packages['transformers']}. {here['cpu']}, {here['cores']} cores, {here['threads']} threads{gpus}.  ",
        f"Made by: {found.made_by}",
    ]
    return "\n".join(lines) + "\n"


def span(values: Sequence[float], digits: int = 2) -> str:
    """The lowest and the highest of repeated measurements."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
