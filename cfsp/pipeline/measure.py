"""Evaluation of the sides of a run (dense, selected, pruned, recovered), with a cache of measured figures."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cfsp.config.identity import METHOD_VERSION, digest
from cfsp.evaluation.base import Side, name_key_in_errors, parts_of
from cfsp.evaluation.measurement import Measurement
from cfsp.evaluation.unchanged import measure_unchanged
from cfsp.pipeline.preflight import Prepared
from cfsp.record import environment
from cfsp.record.validation import figure_problem
from cfsp.system.cache import read_or_compute
from cfsp.system.reading import read_json


def evaluate_dense(prepared: Prepared, model: nn.Module) -> tuple[list[dict[str, Any]], bool]:
    """Evaluate the dense model.

    Returns:
        The figures, one row for each, and whether all of them came from the cache.
    """
    rows: list[dict[str, Any]] = []
    all_cached = True
    for name, evaluator in prepared.config.evaluation.items():
        if evaluator.instance.side_by_side:
            continue
        packages = {
            k: v for k, v in environment.versions().items() if k in ("cfsp", "torch", "transformers", "lm-eval")
        }
        key = digest(
            {
                "model": prepared.identity["model"],
                "dtype": str(prepared.dtype),
                "device": prepared.device.type,
                "evaluator": evaluator.target,
                "source": evaluator.identity().get("source"),
                "inputs": prepared.evaluation[name],
                "packages": packages,
                "version": METHOD_VERSION,
            }
        )
        folder = Path(prepared.config.paths.cache_dir) / "dense"
        for part, part_evaluator in parts_of(evaluator.instance).items():
            path = folder / f"{digest([key, part])[:32]}.json"
            if prepared.config.force:
                path.unlink(missing_ok=True)
            with name_key_in_errors(name, evaluator.instance):
                figures, cached = _cached_figures(path, name, part_evaluator, model, prepared.tokenizer)
            all_cached &= cached
            rows += figures
    return rows, all_cached and bool(rows)


def evaluate_side(prepared: Prepared, model: nn.Module, side: str) -> list[dict[str, Any]]:
    """Evaluate one side and return its figures, one row for each.

    Figures that a killed run of the same id measured come from the cache.
    """
    rows: list[dict[str, Any]] = []
    for name, evaluator in prepared.config.evaluation.items():
        if evaluator.instance.side_by_side:
            continue
        for part, part_evaluator in parts_of(evaluator.instance).items():
            path = prepared.progress / "measured" / f"{digest([side, name, part])[:32]}.json"
            with name_key_in_errors(name, evaluator.instance):
                rows += _cached_figures(path, name, part_evaluator, model, prepared.tokenizer)[0]
    return rows


def _cached_figures(
    path: Path, name: str, evaluator: Any, model: nn.Module, tokenizer: Any
) -> tuple[list[dict[str, Any]], bool]:
    return read_or_compute(
        path,
        _read_figures,
        lambda: [
            measurement.as_dict()
            for measurement in measure_unchanged(name, model, lambda: evaluator.measure(model, tokenizer))
        ],
        lambda values, file: file.write_text(json.dumps(values), encoding="utf-8"),
    )


def _read_figures(file: Path) -> list[dict[str, Any]]:
    """Read cached figures.

    Raises:
        CfspError, ValueError: the file is damaged. The caller then measures the figures again.
    """
    rows = read_json(file, str(file))
    problem = None if isinstance(rows, list) else "no list of figures"
    problem = problem or next((message for row in rows if (message := figure_problem(row)) is not None), None)
    if problem is not None:
        raise ValueError(problem)
    return rows


def evaluate_side_by_side(prepared: Prepared, model: nn.Module, sides: list[Side]) -> dict[str, list[Measurement]]:
    """Run the evaluators that measure sides in alternation; return name of the side -> its measurements."""
    measurements: dict[str, list[Measurement]] = {}
    for name, evaluator in prepared.config.evaluation.items():
        if evaluator.instance.side_by_side:
            measure = partial(evaluator.instance.measure_sides, model, sides)
            for side, rows in measure_unchanged(name, model, measure).items():
                measurements.setdefault(side, []).extend(rows)
    return measurements


def current_side(name: str, prepared: Prepared) -> Side:
    """Return a side that stands for the model in its current state."""
    return Side(name, contextlib.nullcontext, prepared.stored_dtype)


def add_measurements(record: dict[str, list[dict[str, Any]]], measurements: dict[str, list[Measurement]]) -> None:
    """Append the measurements of each side to those in the record."""
    for side, rows in measurements.items():
        record.setdefault(side, []).extend(row.as_dict() for row in rows)
