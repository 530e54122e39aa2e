"""Interface of a part of the benchmark: its settings, its result, and the files of a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfsp.record import environment
from cfsp.tables.markdown_line import line


@dataclass(frozen=True)
class Settings:
    """The checked command line.

    Attributes:
        repeats: how often things are timed.
        work: folder for models and other work.
        results: folder for records and tables.
        device: auto, cpu or cuda.
        shapes: names of the models that are measured.
        dtypes: dtypes on a CPU; a GPU runs bfloat16.
        windows: sizes of the calibration sets of the part calibration, in windows of 512 tokens.
        blocks: blocks of the checkpoint of the part streaming.
        modes: values of model.streaming of the part streaming.
        runs: runs of each mode of the part streaming.
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
    """A limit of a figure.

    Attributes:
        name: name of the figure.
        value: the figure.
        limit: its limit.
        at_least: whether the limit is the smallest value allowed; otherwise it is the largest.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """True where the limit holds. NaN meets no limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{self.name}: {self.value:.4g}, must be {bound} {self.limit:.4g}"


@dataclass
class Result:
    """Result of a part.

    Attributes:
        name: name of its files.
        overrides: overrides of the command line that measures it.
        rows: measurements.
        checks: limits that must hold.
        notes: further entries of the record.
        program: program of that command line.
    """

    name: str
    overrides: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    program: str = "cfsp benchmark"

    @property
    def made_by(self) -> str:
        """Command line that measures it."""
        return f"{self.program} {self.overrides}".rstrip()


def write(result: Result, table: str, settings: Settings) -> None:
    """Write the record benchmarks/NAME.json and the table tables/benchmark_NAME.md under results."""
    checks = [{**asdict(check), "met": check.met} for check in result.checks]
    record = {
        "part": result.name,
        "made_by": result.made_by,
        "repeats": settings.repeats,
        **result.notes,
        "rows": result.rows,
        "checks": checks,
        "environment": environment.describe(),
    }
    for path, content in (
        (settings.results / "benchmarks" / f"{result.name}.json", json.dumps(record, indent=2) + "\n"),
        (settings.results / "tables" / f"benchmark_{result.name}.md", table),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], result: Result, explained: str) -> str:
    """Render a table with its explanation, its limits and its environment. The first column is text."""
    host = environment.describe()
    packages, git = host["packages"], host["git"] or {"commit": "an installed wheel", "dirty": False}
    gpus = f", {', '.join(host['gpus'])}" if host["gpus"] else ""
    lines = [f"### {title}", "", line(head), line(["---", *["--:"] * (len(head) - 1)]), *(line(row) for row in rows)]
    if result.checks:
        lines += ["", *(f"- {'holds' if check.met else '**MISSED**'}: {check}" for check in result.checks)]
    lines += [
        "",
        f"{explained}  ",
        f"Commit: {git['commit'][:12]}{'+changes' if git['dirty'] else ''}. torch {packages['torch']}, transformers "
        f"{packages['transformers']}. {host['cpu']}, {host['cores']} cores, {host['threads']} threads{gpus}.  ",
        f"Made by: {result.made_by}",
    ]
    return "\n".join(lines) + "\n"


def span(values: Sequence[float], digits: int = 2) -> str:
    """Write the lowest and the highest of repeated measurements."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
