"""Checks of plan.json: its values before a plan is built from them, and its sizes against those of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cfsp.plan.expert_tensors import expert_shape_fits

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.plan.pruning_plan import PruningPlan

#: Counts and indices at or above this are damage: no layer has so many units.
_MOST_UNITS = 2**31
#: Most levels of nesting. A plan that was composed n times is nested n levels deep.
_DEEPEST = 100
_TEXTS = ("base_model", "base_fingerprint", "base_sample", "compensation")
_MAPPINGS = ("method", "requested", "achieved", "parameters", "notes")
_LISTS = ("blocks", "details")
_NEEDED = ("base_model", "base_fingerprint", "method", "blocks", "requested", "achieved")
_KEPT = ("ffn_kept", "kv_groups_kept", "experts_kept")
_COUNTS = ("width", "base_width", "kv_groups", "base_kv_groups", "experts", "base_experts")
_TENSOR = re.compile(r"blocks\.(\d{1,6})\.(ffn|attention|experts)\.(bias|weight|gate_weight|up_weight)")


def check_values(values: Mapping[str, Any]) -> None:
    """Check that ``values``, the JSON object of a plan.json, is a plan.

    Raises:
        ValueError: one clause that names the entry and what is wrong with it.
    """
    known = {"schema", *_TEXTS, *_MAPPINGS, *_LISTS}
    for name in values:
        _expect(name in known, f"{name[:60]!r} is no entry of a plan")
    for name in _NEEDED:
        _expect(name in values, f"{name} is missing")
    for names, kind, label in ((_TEXTS, str, "text"), (_MAPPINGS, dict, "an object"), (_LISTS, list, "a list")):
        for name in names:
            _expect(isinstance(values.get(name, kind()), kind), f"{name} must be {label}")
    _check_depth(values)
    _check_method(values["method"])
    _expect(bool(values["blocks"]), "blocks is empty")
    for index, block in enumerate(values["blocks"]):
        _check_block(f"blocks[{index}]", block)
    _check_numbers(values)
    _check_details(values)


def check_tensors(plan: PruningPlan) -> None:
    """Check that the names and shapes of a plan's tensors fit its blocks.

    Raises:
        ValueError: names the tensor.
    """
    for name, tensor in plan.tensors.items():
        parts = _TENSOR.fullmatch(name)
        _expect(parts is not None and int(parts[1]) < len(plan.blocks), f"tensor {name[:80]!r} belongs to no block")
        assert parts is not None
        block, kind, role = plan.blocks[int(parts[1])], parts[2], parts[3]
        _expect(kind == "ffn" or role in ("bias", "weight"), f"tensor {name} belongs to no block")
        dimensions = (1 if role == "bias" else 2) + (kind == "experts")
        _expect(tensor.dim() == dimensions, f"tensor {name} has the shape {list(tensor.shape)}")
        _expect(tensor.is_floating_point(), f"tensor {name} holds no floating-point numbers")
        if kind == "experts":
            fits = expert_shape_fits(tuple(tensor.shape), block)
            _expect(fits, f"tensor {name} has the shape {list(tensor.shape)}, which is not that of what the plan keeps")
            continue
        kept = block.ffn_kept if kind == "ffn" else block.kv_groups_kept
        if role == "bias" or kept is None:
            continue
        units = tensor.shape[1 if role == "weight" else 0]
        fits = units == len(kept) if kind == "ffn" else units % len(kept) == 0
        _expect(fits, f"tensor {name} has the shape {list(tensor.shape)} where {len(kept)} units are kept")


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of a block that is in the model.

    Attributes:
        width: FFN neurons; for a mixture, those of one expert; 0 without an FFN.
        kv_groups: KV groups; 0 without attention, None where the attention is not recognised.
        experts: number of experts; None where the FFN is no mixture.
    """

    width: int
    kv_groups: int | None
    experts: int | None = None


def read_block_sizes(view: DecoderView) -> list[BlockSizes]:
    """Return the sizes of each block of a model."""
    return [
        BlockSizes(
            block.units("neurons").n,
            block.units("kv_groups").n if block.attention is not None or block.attention_removed else None,
            block.units("experts").n or None,
        )
        for block in view.blocks
    ]


def size_mismatch(plan: PruningPlan, sizes: Sequence[BlockSizes]) -> str | None:
    """Return the first contradiction between a plan and the sizes of a model, as a clause; None where they fit."""
    staying = [index for index, block in enumerate(plan.blocks) if block.keeps_block]
    if len(staying) != len(sizes):
        return f"it leaves {len(staying)} blocks, the weights have {len(sizes)}"
    for index, actual in zip(staying, sizes, strict=True):
        block = plan.blocks[index]
        neurons = block.ffn_kept if block.expert_neurons_kept is None else block.expert_neurons_kept[0]
        width = 0 if not block.ffn else (None if neurons is None else len(neurons))
        groups = 0 if not block.attention else (None if block.kv_groups_kept is None else len(block.kv_groups_kept))
        experts = None if block.experts_kept is None or not block.ffn else len(block.experts_kept)
        for name, planned, stored in (
            ("FFN neurons", width, actual.width),
            ("KV groups", groups, actual.kv_groups),
            ("experts", experts, actual.experts or 0),
        ):
            if planned is not None and stored is not None and planned != stored:
                return f"blocks[{index}] keeps {planned} {name}, the weights have {stored}"
    return None


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _check_depth(values: Any) -> None:
    level, depth = [values], 0
    while level:
        depth += 1
        _expect(depth <= _DEEPEST, f"it is nested more than {_DEEPEST} levels deep")
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [item for items in inner for item in items if isinstance(item, dict | list)]


def _check_method(method: Mapping[str, Any]) -> None:
    pending = [("method", method)]
    while pending:
        where, step = pending.pop()
        _expect(isinstance(step, dict) and isinstance(step.get("name"), str), f"{where} has no name")
        steps = step.get("steps", [])
        _expect(isinstance(steps, list), f"{where}.steps must be a list")
        pending += [(f"{where}.steps[{number}]", inner) for number, inner in enumerate(steps)]


def _check_block(where: str, block: Any) -> None:
    known = {*_KEPT, "attention", "ffn", "expert_neurons_kept"}
    _expect(isinstance(block, dict), f"{where} must be an object")
    for name in block:
        _expect(name in known, f"{where}.{name[:60]} is no entry of a block")
    for name in ("attention", "ffn"):
        _expect(isinstance(block.get(name, True), bool), f"{where}.{name} must be true or false")
    for name in _KEPT:
        if block.get(name) is not None:
            _check_kept(f"{where}.{name}", block[name])
    experts = block.get("expert_neurons_kept")
    if experts is not None:
        _expect(isinstance(experts, list) and bool(experts), f"{where}.expert_neurons_kept must be a list of lists")
        for number, kept in enumerate(experts):
            _check_kept(f"{where}.expert_neurons_kept[{number}]", kept)


def _check_kept(where: str, kept: Any) -> None:
    _expect(isinstance(kept, list) and bool(kept), f"{where} must be a non-empty list, or null for all")
    for index in kept:
        _expect(is_count(index), f"{where} must hold whole numbers from 0, not {str(index)[:40]}")
    _expect(all(a < b for a, b in pairwise(kept)), f"{where} must be sorted, without repetitions")


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, number in values.get("parameters", {}).items():
        is_index = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63
        _expect(is_index, f"parameters.{name[:60]} must be a whole number")
    for name, number in values["achieved"].items():
        finite = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        _expect(finite, f"achieved.{name[:60]} must be a number")


def _check_details(values: Mapping[str, Any]) -> None:
    rows, blocks = values.get("details", []), values["blocks"]
    _expect(len(rows) <= len(blocks), f"details has {len(rows)} entries for {len(blocks)} blocks")
    for index, row in enumerate(rows):
        _expect(isinstance(row, dict), f"details[{index}] must be an object")
        for name in _COUNTS:
            _expect(name not in row or is_count(row[name]), f"details[{index}].{name} must be a whole number from 0")
    # After several prunings the rows describe the last pruning, whose base model was pruned already.
    if len(rows) != len(blocks) or values["method"].get("steps"):
        return
    for index, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        for kept, size in (("ffn_kept", "base_width"), ("kv_groups_kept", "base_kv_groups")):
            if block.get(kept) is not None and size in row:
                last = block[kept][-1]
                _expect(last < row[size], f"blocks[{index}].{kept} names {last}, the base model has {row[size]}")


def is_count(value: Any) -> bool:
    """Return whether ``value`` is a whole number from 0 to 2**31 - 1; booleans and floats are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_UNITS
