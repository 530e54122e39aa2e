"""The table that compares recoveries: dense and pruned first, then a row per recovery, at equal training tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from statistics import mean, stdev

from cfsp.record.run_record import RunRecord
from cfsp.system import escape
from cfsp.tables.methods import Figure, line, only
from cfsp.tables.metrics import describe


def recovery_table(records: Sequence[RunRecord], figure: Figure, order: Sequence[str]) -> str:
    """Markdown. Mean ± standard deviation over the seeds; ``gap closed``: of that in log-perplexity, pruned to dense.

    Args:
        records: runs of one model and one pruning that differ in recovery and seed only; those with recovery=none
            are the pruned row.
        order: labels (:func:`label`) of the rows from top to bottom.

    Raises:
        ValueError: records of other models, data, or numbers of tokens among them, or of other seeds in some rows.
    """
    only({record.model["fingerprint"] for record in records}, "model")
    dense = only({figure.of(record, "dense") for record in records}, "dense figure")
    only({str(record.plan and record.plan["requested"]) for record in records}, "budget")
    trained = [record for record in records if record.recovery]
    only({record.recovery["tokens"] for record in trained if record.recovery}, "number of training tokens")
    shown = describe(figure.suite, figure.task, figure.metric)
    rows: dict[str, dict[int, RunRecord]] = {}
    for record in records:
        rows.setdefault(label(record), {})[record.identity["seed"]] = record
    only({tuple(sorted(by_seed)) for by_seed in rows.values()}, "set of seeds")
    pruned = {seed: _value(record, figure) for seed, record in rows["none"].items()}
    head = ["recovery", "trained parameters", "learning rate", shown.label, "gap closed"]
    lines = [line(head), line(["---", *["--:"] * (len(head) - 1)])]
    lines.append(line(["dense", "", "", shown.show(dense), ""]))
    for name in [*(name for name in order if name in rows), *(name for name in rows if name not in order)]:
        values = {seed: _value(record, figure) for seed, record in rows[name].items()}
        closed = [log(pruned[seed] / value) / log(pruned[seed] / dense) for seed, value in values.items()]
        cells = ["pruned, no recovery" if name == "none" else escape.code(name), *_trained(list(rows[name].values()))]
        cells.append(f"{shown.show(mean(values.values()))} ± {shown.show(stdev(values.values()))}")
        cells.append("" if name == "none" else f"{mean(closed):.0%}")
        lines.append(line(cells))
    return "\n".join(lines) + "\n"


def label(record: RunRecord) -> str:
    """The recovery's name, and its objective where it is not the usual one."""
    if not record.recovery:
        return "none"
    name, objective = record.recovery["name"], record.recovery["objective"]
    return name if objective == "lm" else f"{name} recovery.objective={objective}"


def _value(record: RunRecord, figure: Figure) -> float:
    found = figure.of(record, "recovered" if record.recovery else "pruned")
    if found is None:
        raise ValueError(f"{record.run_id}: has no {figure.task} {figure.metric}")
    return found


def _trained(records: Sequence[RunRecord]) -> list[str]:
    """Parameters (ranks follow the calibration windows, so they differ a little by seed) and learning rate."""
    counts = [record.recovery["trainable_parameters"] for record in records if record.recovery]
    if not counts:
        return ["", ""]
    rate = only({record.identity["recovery"]["learning_rate"] for record in records}, "learning rate")
    return [f"{mean(counts):,.0f}", f"{rate:g}"]
