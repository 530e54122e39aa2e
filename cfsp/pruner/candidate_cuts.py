"""Cut submodules of candidates: FFNs and attentions with fewer units, swapped into the loaded model and out again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cfsp.architecture.ffn import FFN
from cfsp.model.snapshot import Snapshot
from cfsp.plan.pruning_plan import BlockPlan
from cfsp.plan.slice_block import slice_block
from cfsp.system.memory import available

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from cfsp.architecture.views import BlockView
    from cfsp.sparsity.budget import SubmoduleKind

#: Cut submodules that are kept for other candidates: this many per block, and this share of the device's free memory
#: in all.
_KEPT, _SHARE_OF_MEMORY = 16, 0.25

#: The parts of an FFN: (owner, attribute, linear), or of fused experts (owner, attribute, parameter).
FFNParts = list[tuple[nn.Module, str, Any]]

#: Function that decides on one submodule: block, kind, kept units -> the decision, and its compensation.
Cut = Callable[["BlockView", "SubmoduleKind", int], tuple[BlockPlan, dict[str, Tensor]]]


class CutSubmodules:
    """Submodules cut to given numbers of units, the last used ones kept within a share of the free memory.

    Inside ``with restored(model)`` only: cutting changes the blocks.
    """

    def __init__(self, blocks: Sequence[BlockView], kinds: Sequence[SubmoduleKind], cut: Cut, device: torch.device):
        self._cut = cut
        self._room = int(_SHARE_OF_MEMORY * available(device))
        self._most = _KEPT * len(blocks)
        #: (block, kind, units) -> the cut submodule, the least recently used first.
        self._kept: OrderedDict[tuple[int, SubmoduleKind, int], FFNParts | Snapshot] = OrderedDict()
        self._dense = {
            (block.index, kind): submodule for block in blocks for kind in kinds if (submodule := _now(block, kind))
        }

    @contextmanager
    def installed(self, block: BlockView, counts: dict[SubmoduleKind, int]) -> Iterator[None]:
        """Give the block cut submodules inside, and its dense ones back afterwards.

        Args:
            block: the block, dense.
            counts: kept units by the kind of the submodules that lose units.
        """
        try:
            for kind, count in counts.items():
                _put(self._cut_to(block, kind, count))
            yield
        finally:
            for kind in counts:
                _put(self._dense[block.index, kind])

    def _cut_to(self, block: BlockView, kind: SubmoduleKind, count: int) -> FFNParts | Snapshot:
        key = (block.index, kind, count)
        if key not in self._kept:
            decision, tensors = self._cut(block, kind, count)
            slice_block(block, decision, tensors)
            cut = _now(block, kind)
            assert cut is not None
            self._kept[key] = cut
            self._room -= _bytes(cut)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and (self._room < 0 or len(self._kept) > self._most):
            self._room += _bytes(self._kept.popitem(last=False)[1])
        return self._kept[key]


def _now(block: BlockView, kind: SubmoduleKind) -> FFNParts | Snapshot | None:
    """Return the submodule of a block as it is now; None where there is none."""
    if kind == "attention":
        return None if block.attention is None else Snapshot(block.attention.module)
    if block.ffn is None:
        return None
    if isinstance(block.ffn, FFN):
        return _linears(block.ffn)
    stored = [(module, name, getattr(module, name)) for module, name in block.ffn.stored()]
    return stored if block.ffn.fused else [part for expert in block.ffn.each for part in _linears(expert)]


def _put(submodule: FFNParts | Snapshot) -> None:
    if isinstance(submodule, Snapshot):
        submodule.restore()
        return
    for owner, name, part in submodule:
        setattr(owner, name, part)


def _linears(ffn: FFN) -> FFNParts:
    return [(projection.owner, projection.name, projection.module) for projection in ffn.projections.values()]


def _bytes(submodule: FFNParts | Snapshot) -> int:
    if isinstance(submodule, Snapshot):
        return sum(parameter.nbytes for parameter in submodule.parameters())
    tensors = [part.parameters() if isinstance(part, nn.Module) else [part] for *_, part in submodule]
    return sum(parameter.nbytes for part in tensors for parameter in part)
