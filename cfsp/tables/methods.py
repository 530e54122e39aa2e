"""The table that compares methods: dense first, then a row per method and a pair of columns per ratio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from cfsp.record.run_record import RunRecord
from cfsp.system import escape
from cfsp.tables.metrics import describe


@dataclass(frozen=True)
class Figure:
    """Which figure of a record the table shows."""

    suite: str
    task: str
    metric: str

    def of(self, record: RunRecord, side: str) -> float | None:
        """Its value for ``side`` (dense or pruned); None where it was not measured."""
        wanted = (self.suite, self.task, self.metric)
        for row in record.measurements.get(side, ()):
            if (row["suite"], row["task"], row["metric"]) == wanted:
                return float(row["value"])
        return None


def method_table(records: Sequence[RunRecord], figure: Figure, order: Sequence[str]) -> str:
    """Markdown. Cells: achieved share of the scope's parameters, and mean ± standard deviation over the seeds.

    Args:
        records: runs of one model that differ in method, ratio and seed only.
        order: labels (:func:`label`) of the rows from top to bottom.

    Raises:
        ValueError: the records were not all of one model and scope, or their dense figures differ.
    """
    first = records[0]
    scope = only({_requested(record)["scope"] for record in records}, "scope")
    only({record.model["fingerprint"] for record in records}, "model")
    dense = only({figure.of(record, "dense") for record in records}, "dense figure")
    shown = describe(figure.suite, figure.task, figure.metric)
    ratios = sorted({_requested(record)["ratio"] for record in records})
    head = ["method", *(text for ratio in ratios for text in (f"{ratio:.0%}: removed", shown.label))]
    lines = [line(head), line(["---", *["--:"] * (len(head) - 1)])]
    lines.append(line([f"dense ({_count(first)})", *["0 %", "" if dense is None else shown.show(dense)] * len(ratios)]))
    by_label: dict[str, list[RunRecord]] = {}
    for record in records:
        by_label.setdefault(label(record), []).append(record)
    for name in [*order, *(name for name in by_label if name not in order)]:
        cells = [escape.code(name)]
        for ratio in ratios:
            cells += _cells([r for r in by_label.get(name, ()) if _requested(r)["ratio"] == ratio], figure, shown.show)
        lines.append(line(cells))
    return "\n".join(lines) + f"\n\nremoved: of the parameters of `sparsity.scope={scope}`.\n"


def label(record: RunRecord) -> str:
    """The method's name, and its structure where that is not what the name says."""
    settings = record.method.get("pruner", {})
    name, structure = record.method["name"], settings.get("structure")
    usual = "heads_ffn" if name in ("flap_al_am", "wanda_sp_sequential", "llm_pruner") else "ffn"
    return name if structure in (None, usual) else f"{name} pruner.structure={structure}"


def _cells(records: Iterable[RunRecord], figure: Figure, show: Any) -> list[str]:
    found = list(records)
    values = [value for record in found if (value := figure.of(record, "pruned")) is not None]
    if not values:
        return ["", ""]
    removed = mean(record.plan["achieved"]["ratio"] for record in found if record.plan is not None)
    spread = f" ± {show(stdev(values))}" if len(values) > 1 else ""
    return [f"{removed:.1%}", f"{show(mean(values))}{spread}"]


def _requested(record: RunRecord) -> dict[str, Any]:
    if record.plan is None:
        raise ValueError(f"{record.run_id}: a run without a plan does not belong into a table of methods")
    return record.plan["requested"]


def _count(record: RunRecord) -> str:
    assert record.plan is not None
    return describe("cost", "parameters", "count").show(record.plan["parameters"]["before"]) + " parameters"


def only(values: set[Any], what: str) -> Any:
    """The one value; ValueError where there are several, which do not belong into one table."""
    if len(values) != 1:
        raise ValueError(f"one {what} is needed in one table, found {sorted(map(str, values))}")
    return next(iter(values))


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
