"""Interface of a part of the benchmark: its settings, its result, and the files of a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfsp.record import environment
from cfsp.tables.markdown_row import markdown_row


@dataclass(frozen=True)
class Settings:
    """The checked command line.

    Attributes:
        repeats: number of timings.
        work: folder for models and temporary files.
        results: folder for records and tables.
        device: auto, cpu or cuda.
        shapes: names of the shapes to measure (:data:`cfsp.benchmark.shapes.SHAPES`).
        dtypes: dtypes on a CPU; a GPU uses bfloat16.
        windows: sizes of the calibration sets in the part calibration, in windows of 512 tokens.
        blocks: number of blocks of the checkpoint in the part streaming.
        modes: values of model.streaming in the part streaming.
        runs: number of runs of each mode in the part streaming.
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
    """A figure with its limit.

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
        """True if the limit holds. NaN meets no limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{self.name}: {self.value:.4g}, must be {bound} {self.limit:.4g}"


@dataclass
class Result:
    """Result of a part.

    Attributes:
        name: name of the files of the result.
        overrides: overrides of the command line that measures the result.
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
        """Command line that measures the result."""
        return f"{self.program} {self.overrides}".rstrip()


def write_result(result: Result, table: str, settings: Settings) -> None:
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


def markdown_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], result: Result, explained: str
) -> str:
    """Render a table as Markdown, with an explanation, the limits and the environment below it.

    Args:
        title: heading of the table.
        head: heads of the columns; the first column is text, the others are numbers.
        rows: texts of the cells.
        result: result whose limits and command line are stated.
        explained: explanation of the columns.
    """
    host = environment.describe()
    packages, git = host["packages"], host["git"] or {"commit": "an installed wheel", "dirty": False}
    gpus = f", {', '.join(host['gpus'])}" if host["gpus"] else ""
    lines = [
        f"### {title}",
        "",
        markdown_row(head),
        markdown_row(["---", *["--:"] * (len(head) - 1)]),
        *(markdown_row(row) for row in rows),
    ]
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


def format_range(values: Sequence[float], digits: int = 2) -> str:
    """Format the range of repeated measurements, from the lowest to the highest."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
