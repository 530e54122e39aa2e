"""The pruning plan: which units of which base model stay. Frozen, serialisable, separate from any weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError

SCHEMA = 1


@dataclass(frozen=True)
class BlockPlan:
    """``ffn_kept`` and ``kv_groups_kept``: sorted indices, None = all; ``attention``/``ffn``: the submodule stays."""

    ffn_kept: tuple[int, ...] | None = None
    kv_groups_kept: tuple[int, ...] | None = None
    attention: bool = True
    ffn: bool = True

    def __post_init__(self) -> None:
        for name in ("ffn_kept", "kv_groups_kept"):
            kept = getattr(self, name)
            if kept is not None and (not kept or list(kept) != sorted(set(kept)) or kept[0] < 0):
                raise CheckpointError(f"plan: {name} must be a non-empty list of sorted, distinct indices")


@dataclass(frozen=True)
class PruningPlan:
    """What to keep of ``base_model`` (whose content is ``base_fingerprint``), and why.

    ``base_sample`` (:func:`cfsp.models.sample.weight_sample`) recognises the base model in memory.

    ``requested`` and ``achieved`` state the budget; ``parameters`` the counts before and after; ``details`` holds per
    block what led to the decision (width, keep ratio, distance). Replayed on the base model by
    :func:`cfsp.pruning.apply.apply`, a plan gives the same weights bit for bit.
    """

    base_model: str
    base_fingerprint: str
    method: dict[str, Any]
    blocks: tuple[BlockPlan, ...]
    requested: dict[str, Any]
    achieved: dict[str, Any]
    parameters: dict[str, int] = field(default_factory=dict)
    details: tuple[dict[str, Any], ...] = ()
    base_sample: str = ""
    schema: int = SCHEMA

    def save(self, path: str | Path) -> Path:
        """Write plan.json atomically."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)
        return path

    def to_json(self) -> str:
        """One line per block, so that two plans can be compared with diff."""
        values = {"schema": self.schema, **{k: v for k, v in asdict(self).items() if k != "schema"}}
        lines = []
        for key, value in values.items():
            if isinstance(value, tuple):
                rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
                lines.append(f'  "{key}": [\n{rows}\n  ]')
            else:
                lines.append(f'  "{key}": {json.dumps(value)}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def load(path: str | Path) -> PruningPlan:
        """Read a plan.json.

        Raises:
            CheckpointError: missing, not JSON, of another schema, or with wrong entries.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"plan {path}: cannot be read ({error.strerror}); give a plan.json") from error
        except ValueError as error:
            raise CheckpointError(f"plan {path}: not valid JSON ({error})") from error
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else None
            raise CheckpointError(f"plan {path}: schema {found!r}; this version of cfsp reads schema {SCHEMA}")
        try:
            rows: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in values["blocks"]
            ]
            blocks = tuple(BlockPlan(**row) for row in rows)
            details = tuple(values.pop("details", ()))
            return PruningPlan(**{**values, "blocks": blocks, "details": details})
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"plan {path}: not a pruning plan ({error})") from error

    def compose(self, earlier: PruningPlan) -> PruningPlan:
        """This plan in terms of the base of ``earlier``, whose result was this plan's base."""
        if len(earlier.blocks) != len(self.blocks):
            raise CheckpointError("the two plans have different numbers of blocks and cannot be composed")
        blocks = tuple(
            BlockPlan(
                _compose(first.ffn_kept, then.ffn_kept),
                _compose(first.kv_groups_kept, then.kv_groups_kept),
                first.attention and then.attention,
                first.ffn and then.ffn,
            )
            for first, then in zip(earlier.blocks, self.blocks, strict=True)
        )
        method = {"name": "composed", "steps": [earlier.method, self.method]}
        parameters = {"before": earlier.parameters.get("before", 0), "after": self.parameters.get("after", 0)}
        return PruningPlan(
            earlier.base_model,
            earlier.base_fingerprint,
            method,
            blocks,
            self.requested,
            self.achieved,
            parameters,
            self.details,
            earlier.base_sample,
        )


def _compose(first: tuple[int, ...] | None, then: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[index] for index in then)
