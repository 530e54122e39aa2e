"""Cells, measurements and records that are made up; their form is not. And a layout of a table for them."""

from __future__ import annotations

import re

from cfsp.config.compose import compose
from cfsp.config.identity import METHOD_VERSION
from cfsp.config.parse import parse
from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import Cell
from cfsp.tables.layout import MeanOf, TableLayout

ENVIRONMENT = {
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "packages": {"cfsp": "0.1.0", "torch": "2.13.0", "transformers": "5.0", "lm-eval": "0.4"},
    "cpu": "EPYC", "cores": 2, "gpus": [],
}  # fmt: skip
LAYOUT = TableLayout(
    caption="A caption with 50 % & more",
    groups=["sparsity.ratio"],
    rows=["pruner"],
    metrics=["removed", "perplexity/*", MeanOf(mean="zero_shot/*/acc", label="mean acc")],
)


def cell_of(pruner: str, seed: int, ratio: str = "0.5", **more: str) -> Cell:
    point = {"pruner": pruner, "sparsity.ratio": ratio, "seed": str(seed), **more}
    return Cell(tuple(f"{key}={value}" for key, value in point.items()), point)


def row_of(suite: str, task: str, metric: str, value: float, **more):
    return {"suite": suite, "task": task, "metric": metric, "value": value, "unit": "", "n": 8, "seq_len": 256, **more}


def record_of(cell: Cell, perplexity: float, acc: float = 0.5, dense: float = 40.0, **more) -> RunRecord:
    def side(value: float, points: float):
        return [
            row_of("perplexity", "bundled", "perplexity", value),
            row_of("zero_shot", "one", "acc", points),
            row_of("zero_shot", "two", "acc", points + 0.2),
        ]

    values = {
        "run_id": re.sub(r"[^\w.-]", "_", "-".join(cell.point.values()))[:100],
        "status": "success",
        "configuration": parse(compose(cell.overrides)).raw,
        "identity": {"version": METHOD_VERSION},
        "environment": ENVIRONMENT,
        "model": {"fingerprint": "sha256:1", "dtype": "float32"},
        "plan": {"achieved": {"ratio": float(cell.point["sparsity.ratio"])}},
        "measurements": {"dense": side(dense, 0.7), "pruned": side(perplexity, acc)},
        "error": None,
    }
    return RunRecord(**{**values, **more})
