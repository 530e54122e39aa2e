"""The pruning plan: which units of which base model stay. Frozen, serialisable, separate from the base's weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError
from cfsp.pruning.plan_check import check_tensors, check_values
from cfsp.system.atomic import write_bytes
from cfsp.system.reading import check_regular, parse_json, read_text

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
#: Beside plan.json: the tensors that a method replaces.
COMPENSATION = "compensation.safetensors"
#: The same in a model folder, where tools take every safetensors file at the top for weights.
COMPENSATION_IN_FOLDER = f"plan/{COMPENSATION}"

#: The matrices of an FFN whose rows are its neurons.
_ROWS = ("gate", "up")


@dataclass(frozen=True)
class BlockPlan:
    """``ffn_kept`` and ``kv_groups_kept``: sorted indices, None = all; ``attention``/``ffn``: the submodule stays.

    Of a mixture of experts ``experts_kept`` says which experts stay, and ``expert_neurons_kept`` holds the neurons kept
    of each expert that stays, in their order, of all the same number; None = all. plan.json has these two where they
    are not None.
    """

    ffn_kept: tuple[int, ...] | None = None
    kv_groups_kept: tuple[int, ...] | None = None
    attention: bool = True
    ffn: bool = True
    expert_neurons_kept: tuple[tuple[int, ...], ...] | None = None
    experts_kept: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("ffn_kept", "kv_groups_kept", "experts_kept"):
            _check_kept(name, getattr(self, name))
        if self.expert_neurons_kept is None:
            return
        for kept in self.expert_neurons_kept:
            _check_kept("expert_neurons_kept", kept)
        experts = len(self.expert_neurons_kept if self.experts_kept is None else self.experts_kept)
        if len({len(kept) for kept in self.expert_neurons_kept}) != 1 or len(self.expert_neurons_kept) != experts:
            raise CheckpointError(
                "plan: expert_neurons_kept must hold a list of equal length for each expert that stays"
            )

    def as_dict(self) -> dict[str, Any]:
        """As plan.json has it: of dense models what it always had."""
        return {name: value for name, value in vars(self).items() if "expert" not in name or value is not None}

    @property
    def keeps_block(self) -> bool:
        """False where neither submodule stays: the block does nothing and goes as a whole."""
        return self.attention or self.ffn


@dataclass(frozen=True)
class PruningPlan:
    """What to keep of ``base_model`` (whose content is ``base_fingerprint``), and why.

    ``base_sample`` (:func:`cfsp.models.sample.weight_sample`) recognises the base model in memory.

    ``requested`` and ``achieved`` state the budget; ``parameters`` the counts before and after; ``details`` holds per
    block what led to the decision (width, keep ratio, distance), ``notes`` what the method decided on the way.
    ``tensors`` are biases [d] and weights [d, kept] of output projections, and weights [kept, d] of gate and up, that
    replace the base model's (name:
    :func:`tensor_name`); they are kept in compensation.safetensors beside plan.json, whose hash ``compensation`` is.
    Replayed on the base model by :func:`cfsp.pruning.apply.apply`, a plan gives the same weights bit for bit.
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
    notes: dict[str, Any] = field(default_factory=dict)
    compensation: str = ""
    schema: int = SCHEMA
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.tensors and not self.compensation:
            object.__setattr__(self, "compensation", _digest(self.tensors))

    def save(self, path: str | Path) -> Path:
        """Write plan.json, and compensation.safetensors beside it where there are tensors, atomically."""
        path = Path(path)
        for name, content in self.files(path.name).items():
            write_bytes(path.with_name(name), content)
        return path

    def files(self, name: str = "plan.json", tensors: str = COMPENSATION) -> dict[str, bytes]:
        """The plan as files: name -> content; the tensors come first, so that a plan never lacks them."""
        from safetensors.torch import save

        replaced = {tensors: save(dict(self.tensors))} if self.tensors else {}
        return {**replaced, name: self.to_json().encode()}

    def to_json(self) -> str:
        """One line per block, so that two plans can be compared with diff."""
        names = ["schema", *(entry.name for entry in fields(self) if entry.name not in ("schema", "tensors"))]
        lines = []
        for key in names:
            value = getattr(self, key)
            if isinstance(value, tuple):
                rows = ",\n".join(f"    {json.dumps(row.as_dict() if key == 'blocks' else row)}" for row in value)
                lines.append(f'  "{key}": [\n{rows}\n  ]')
            else:
                lines.append(f'  "{key}": {json.dumps(value)}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def load(path: str | Path, *, tensors: bool = True) -> PruningPlan:
        """Read a plan.json, and the compensation.safetensors beside it where the plan has one.

        Args:
            path: the plan.json.
            tensors: read the tensors too; without them the plan says what goes, and cannot be applied.

        Raises:
            CheckpointError: missing, not JSON, of another schema, with wrong entries, or without its tensors.
        """
        path = Path(path)
        values = parse_json(read_text(path, f"plan {path}"), f"plan {path}")
        if not isinstance(values, dict) or values.get("schema") != SCHEMA or isinstance(values["schema"], bool):
            found = values.get("schema") if isinstance(values, dict) else None
            raise CheckpointError(f"plan {path}: schema {found!r:.60}; this version of cfsp reads schema {SCHEMA}")
        try:
            check_values(values)
            rows: list[dict[str, Any]] = [{k: _frozen(v) for k, v in row.items()} for row in values["blocks"]]
            blocks = tuple(BlockPlan(**row) for row in rows)
            details = tuple(values.pop("details", ()))
            plan = PruningPlan(**{**values, "blocks": blocks, "details": details})
            if plan.compensation and tensors:
                plan = replace(plan, tensors=_read_tensors(path, plan.compensation))
                check_tensors(plan)
            return plan
        except CheckpointError as error:
            raise CheckpointError(f"plan {path}: {str(error).removeprefix(f'plan {path}: ')}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"plan {path}: not a pruning plan ({error})") from error

    def compose(self, earlier: PruningPlan) -> PruningPlan:
        """This plan in terms of the base of ``earlier``, whose result was this plan's base."""
        staying = [index for index, block in enumerate(earlier.blocks) if block.keeps_block]
        if len(staying) != len(self.blocks):
            raise CheckpointError("the two plans have different numbers of blocks and cannot be composed")
        blocks = list(earlier.blocks)
        for index, then in zip(staying, self.blocks, strict=True):
            try:
                blocks[index] = _composed(blocks[index], then)
            except (IndexError, ValueError) as error:
                raise CheckpointError(
                    f"block {index}: the later plan keeps units that the earlier one has removed, so the two cannot be "
                    "composed"
                ) from error
        renamed = {_moved(name, staying): tensor for name, tensor in self.tensors.items()}
        kept = _still_there(earlier, dict(zip(staying, self.blocks, strict=True)))
        needed = {
            tensor_name(index, kind, what)
            for index, block in enumerate(blocks)
            for kind, stays in (("ffn", block.ffn), ("attention", block.attention))
            for what in ("bias", "weight", *(f"{name}_weight" for name in _ROWS if kind == "ffn"))
            if stays
        }
        tensors = {name: tensor for name, tensor in {**kept, **renamed}.items() if name in needed}
        return PruningPlan(
            earlier.base_model,
            earlier.base_fingerprint,
            {"name": "composed", "steps": [earlier.method, self.method]},
            tuple(blocks),
            self.requested,
            self.achieved,
            {"before": earlier.parameters.get("before", 0), "after": self.parameters.get("after", 0)},
            self.details,
            earlier.base_sample,
            self.notes,
            tensors=tensors,
        )


def _check_kept(name: str, kept: tuple[int, ...] | None) -> None:
    if kept is not None and (not kept or list(kept) != sorted(set(kept)) or kept[0] < 0):
        raise CheckpointError(f"plan: {name} must be a non-empty list of sorted, distinct indices")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def tensor_name(block: int, kind: str, what: str = "bias") -> str:
    """The name of a block's replaced bias, or refitted weight, of down_proj (kind ffn) or o_proj (attention).

    ``what`` is bias, weight, or gate_weight and up_weight of the FFN's other two matrices.
    """
    return f"blocks.{block}.{kind}.{what}"


def _still_there(earlier: PruningPlan, then: Mapping[int, BlockPlan]) -> dict[str, Tensor]:
    """The tensors of ``earlier``, its refitted weights without what ``then`` takes away."""
    tensors = dict(earlier.tensors)
    for index, later in then.items():
        first = earlier.blocks[index]
        for kind, before, after in (
            ("ffn", first.ffn_kept, later.ffn_kept),
            ("attention", first.kv_groups_kept, later.kv_groups_kept),
        ):
            name = tensor_name(index, kind, "weight")
            if name in tensors and before is not None and after is not None:
                by_unit = tensors[name].unflatten(1, (len(before), -1))
                tensors[name] = by_unit[:, list(after)].flatten(1).contiguous()
        for name in (tensor_name(index, "ffn", f"{row}_weight") for row in _ROWS):
            if name in tensors and first.ffn_kept is not None and later.ffn_kept is not None:
                tensors[name] = tensors[name][list(later.ffn_kept)].contiguous()
    return tensors


def _moved(name: str, staying: list[int]) -> str:
    return re.sub(r"\d+", lambda found: str(staying[int(found.group())]), name, count=1)


def _composed(first: BlockPlan, then: BlockPlan) -> BlockPlan:
    attention, ffn = first.attention and then.attention, first.ffn and then.ffn
    return BlockPlan(
        _compose(first.ffn_kept, then.ffn_kept) if ffn else None,
        _compose(first.kv_groups_kept, then.kv_groups_kept) if attention else None,
        attention,
        ffn,
        _compose_neurons(first, then) if ffn else None,
        _compose(first.experts_kept, then.experts_kept) if ffn else None,
    )


def _compose_neurons(first: BlockPlan, then: BlockPlan) -> tuple[tuple[int, ...], ...] | None:
    """The neurons of the experts that stay in the end, in terms of the base's."""
    before, after = first.expert_neurons_kept, then.expert_neurons_kept
    if before is not None and then.experts_kept is not None:
        before = tuple(before[expert] for expert in then.experts_kept)
    if before is None or after is None:
        return after if before is None else before
    return tuple(tuple(old[neuron] for neuron in new) for old, new in zip(before, after, strict=True))


def _compose(first: tuple[int, ...] | None, then: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[index] for index in then)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and values (not of the file, whose header may differ between versions)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _read_tensors(plan: Path, expected: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = plan.with_name(COMPENSATION)
    if not file.is_file() and (plan.parent / COMPENSATION_IN_FOLDER).is_file():
        file = plan.parent / COMPENSATION_IN_FOLDER
    try:
        check_regular(file, f"plan {plan}: {file.name}")
        tensors = load_file(file)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(f"plan {plan}: {COMPENSATION} beside it cannot be read ({error}); copy both") from error
    if _digest(tensors) != expected:
        raise CheckpointError(f"plan {plan}: {COMPENSATION} beside it belongs to another plan; copy both together")
    return tensors
