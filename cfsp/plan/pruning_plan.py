"""The pruning plan: the units of a base model that stay. It is frozen, serialisable and separate from the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cfsp.errors import CheckpointError
from cfsp.plan.check import check_tensors, check_values
from cfsp.plan.expert_tensors import remaining_experts
from cfsp.system.atomic import write_bytes
from cfsp.system.reading import check_regular, parse_json, read_text

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
#: The file beside plan.json with the tensors that a method replaces.
COMPENSATION = "compensation.safetensors"
#: The same in a model folder, where tools take every safetensors file at the top for weights.
COMPENSATION_IN_FOLDER = f"plan/{COMPENSATION}"

#: The matrices of an FFN whose rows are its neurons.
_ROWS = ("gate", "up")


@dataclass(frozen=True)
class BlockPlan:
    """The units of one block that stay. Indices are sorted, and None stands for all.

    Attributes:
        ffn_kept: FFN neurons.
        kv_groups_kept: KV groups.
        attention: whether the attention stays.
        ffn: whether the FFN stays.
        expert_neurons_kept: in a mixture, the neurons of each expert that stays, in the order of the experts, all of
            the same number. plan.json has this entry only where it is not None.
        experts_kept: in a mixture, the experts that stay. plan.json has this entry only where it is not None.
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
        """Return the entry of plan.json; for dense models it has no keys of experts."""
        return {name: value for name, value in vars(self).items() if "expert" not in name or value is not None}

    @property
    def keeps_block(self) -> bool:
        """Return whether the plan keeps at least one submodule of the block; otherwise the whole block is removed."""
        return self.attention or self.ffn


@dataclass(frozen=True)
class PruningPlan:
    """The units of a base model that stay, and the facts that led to the decision.

    Replayed on the base model by :func:`cfsp.pruner.apply.apply`, a plan gives the same weights bit for bit.

    Attributes:
        base_model: name of the base model.
        base_fingerprint: content of the base model.
        method: the settings that decided.
        blocks: the decision on each block.
        requested: the budget that was asked for.
        achieved: the budget that the plan meets.
        parameters: parameters of the model before and after.
        details: facts on each block that led to its decision (width, keep ratio, distance).
        base_sample: recognises the base model in memory (:func:`cfsp.model.weight_sample.weight_sample`).
        notes: facts on how the method decided.
        compensation: hash of ``tensors``; empty where there are none.
        schema: version of this format.
        tensors: name (:class:`TensorKey`) -> tensor that replaces the base model's: biases [d] and weights [d, kept]
            of output projections, in a mixture [E, d] and [E, d, kept], and weights [kept, d] of gate and up. They lie
            in compensation.safetensors beside plan.json.
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
        """Return the plan as files: name -> content. The tensors come first, so that a plan never lacks them."""
        from safetensors.torch import save

        replaced = {tensors: save(dict(self.tensors))} if self.tensors else {}
        return {**replaced, name: self.to_json().encode()}

    def to_json(self) -> str:
        """Serialise the plan with one line per block, so that two plans can be compared with diff."""
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
            tensors: read the tensors too; without them the plan can be read, but not applied.

        Raises:
            CheckpointError: the file is missing or no JSON, has another schema or wrong entries, or lacks its tensors.
        """
        path = Path(path)
        values = parse_json(read_text(path, f"plan {path}"), f"plan {path}")
        if not isinstance(values, dict) or values.get("schema") != SCHEMA or isinstance(values["schema"], bool):
            schema = values.get("schema") if isinstance(values, dict) else None
            raise CheckpointError(f"plan {path}: schema {schema!r:.60}; this version of cfsp reads schema {SCHEMA}")
        try:
            check_values(values)
            rows: list[dict[str, Any]] = [{k: _to_tuples(v) for k, v in row.items()} for row in values["blocks"]]
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
        """Combine this plan with the plan that was applied before it.

        Args:
            earlier: the plan whose result is the base model of this plan.

        Returns:
            A plan that has the effect of both on the base model of ``earlier``.

        Raises:
            CheckpointError: this plan keeps units that ``earlier`` removes, or the numbers of blocks differ.
        """
        staying = [index for index, block in enumerate(earlier.blocks) if block.keeps_block]
        if len(staying) != len(self.blocks):
            raise CheckpointError("the two plans have different numbers of blocks and cannot be composed")
        blocks = list(earlier.blocks)
        for index, later in zip(staying, self.blocks, strict=True):
            try:
                blocks[index] = _compose_blocks(blocks[index], later)
            except (IndexError, ValueError) as error:
                raise CheckpointError(
                    f"block {index}: the later plan keeps units that the earlier one has removed, so the two cannot be "
                    "composed"
                ) from error
        renamed = {_in_base_of_earlier(name, staying): tensor for name, tensor in self.tensors.items()}
        kept = _remaining_tensors(earlier, dict(zip(staying, self.blocks, strict=True)))
        needed = {key.name for index, block in enumerate(blocks) for key in _tensor_keys(index, block)}
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


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list) else value


class TensorKey(NamedTuple):
    """A tensor that a plan replaces.

    Attributes:
        block: index of the block.
        kind: ffn for down_proj, attention for o_proj, experts for the down matrices of all experts.
        what: bias or weight of that projection, or gate_weight or up_weight for the FFN's other two matrices.
    """

    block: int
    kind: str
    what: str = "bias"

    @property
    def name(self) -> str:
        """Name of the tensor in compensation.safetensors."""
        return f"blocks.{self.block}.{self.kind}.{self.what}"

    @staticmethod
    def parse(name: str) -> TensorKey:
        """Read the key from a name."""
        _, block, kind, what = name.split(".")
        return TensorKey(int(block), kind, what)


def tensor_name(block: int, kind: str, what: str = "bias") -> str:
    """Return the name of a tensor that a plan replaces (:class:`TensorKey`)."""
    return TensorKey(block, kind, what).name


def _tensor_keys(index: int, block: BlockPlan) -> Iterator[TensorKey]:
    """Yield the keys of all tensors that may be replaced in the submodules that stay in a block."""
    if block.ffn:
        for what in ("bias", "weight", *(f"{row}_weight" for row in _ROWS)):
            yield TensorKey(index, "ffn", what)
        for what in ("bias", "weight"):
            yield TensorKey(index, "experts", what)
    if block.attention:
        for what in ("bias", "weight"):
            yield TensorKey(index, "attention", what)


def _remaining_tensors(earlier: PruningPlan, later_blocks: Mapping[int, BlockPlan]) -> dict[str, Tensor]:
    """Return the tensors of ``earlier`` without the columns and rows that the later plan removes."""
    tensors = dict(earlier.tensors)
    for index, later in later_blocks.items():
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
        names = (tensor_name(index, "experts", what) for what in ("bias", "weight"))
        tensors |= {name: remaining_experts(tensors[name], later) for name in names if name in tensors}
    return tensors


def _in_base_of_earlier(name: str, staying: list[int]) -> str:
    """Return the name of a later plan's tensor with the block's index in the earlier plan's base."""
    key = TensorKey.parse(name)
    return key._replace(block=staying[key.block]).name


def _compose_blocks(first: BlockPlan, then: BlockPlan) -> BlockPlan:
    attention, ffn = first.attention and then.attention, first.ffn and then.ffn
    return BlockPlan(
        _compose_indices(first.ffn_kept, then.ffn_kept) if ffn else None,
        _compose_indices(first.kv_groups_kept, then.kv_groups_kept) if attention else None,
        attention,
        ffn,
        _compose_neurons(first, then) if ffn else None,
        _compose_indices(first.experts_kept, then.experts_kept) if ffn else None,
    )


def _compose_neurons(first: BlockPlan, then: BlockPlan) -> tuple[tuple[int, ...], ...] | None:
    """Return the neurons of the experts that stay in the end, as indices in the base model."""
    before, after = first.expert_neurons_kept, then.expert_neurons_kept
    if before is not None and then.experts_kept is not None:
        before = tuple(before[expert] for expert in then.experts_kept)
    if before is None or after is None:
        return after if before is None else before
    return tuple(tuple(old[neuron] for neuron in new) for old, new in zip(before, after, strict=True))


def _compose_indices(first: tuple[int, ...] | None, then: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[index] for index in then)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, shapes and values; the file's own would differ between versions of safetensors."""
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
