"""Removing a whole attention or FFN from a block: its modules, and the norms that serve it alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cfsp.architecture.ffn import FFN
from cfsp.architecture.norms import served, watched
from cfsp.architecture.views import KINDS, BlockView, DecoderView, Kind
from cfsp.errors import UnsupportedModelError
from cfsp.model.block_calls import output_hidden, replace_forward
from cfsp.model.driver import BlockDriver, Entry, run_block
from cfsp.model.snapshot import clone_module
from cfsp.pruned_model.family import pruned_family
from cfsp.pruned_model.names import stock_type

#: Cache of the norms of each model.
_NORMS: weakref.WeakKeyDictionary[nn.Module, dict[Kind, tuple[str, ...]]] = weakref.WeakKeyDictionary()


def parts(block: BlockView, kind: Kind) -> tuple[str, ...]:
    """Return the names, within the block, of the modules of a submodule; the first one gives its output.

    Raises:
        UnsupportedModelError: the block has no such submodule, or it is not recognised.
    """
    children = dict(block.module.named_children())
    if kind == "mlp" and block.ffn is not None:
        if isinstance(block.ffn, FFN) and block.ffn.module is block.module:  # The FFN of OPT has no module of its own.
            return (block.ffn.output.name, *dict.fromkeys(projection.name for projection in block.ffn.inputs.values()))
        inner: nn.Module | None = block.ffn.module
    else:
        inner = block.attention.module if kind == "attention" and block.attention is not None else None
    for name, child in children.items():
        if inner is not None and any(module is inner for module in child.modules()):
            return (name,)
        if inner is None and kind == "attention" and "attention" in type(child).__name__.lower():
            return (name,)
    raise UnsupportedModelError(
        f"block {block.index}: its {'FFN' if kind == 'mlp' else kind} was not recognised as a module; found "
        f"{', '.join(f'{name} ({type(child).__name__})' for name, child in children.items())}"
    )


def submodule_parameters(block: BlockView, kind: Kind) -> int:
    """Return the parameters of a block's attention or FFN, without its norms."""
    return _count(block, parts(block, kind))


def norm_parameters(view: DecoderView, block: BlockView, kind: Kind) -> int:
    """Return the parameters of the norms that serve a block's attention or FFN alone."""
    return _count(block, norms(view, kind))


def norms(view: DecoderView, kind: Kind) -> tuple[str, ...]:
    """Return the names, within a block, of the norms that serve the submodule alone and are removed with it.

    A norm belongs to the submodule if its output enters the submodule, or its input comes from it. A norm that feeds
    both submodules belongs to neither.
    """
    if view.model not in _NORMS:
        if not view.weights.is_streamed and next(view.model.parameters()).is_meta:  # No block can be run.
            return pruned_family(stock_type(view.model.config.model_type)).norms.get(kind, ())
        _NORMS[view.model] = _seen_norms(view)
    return _NORMS[view.model][kind]


def remove_submodule(view: DecoderView, block: BlockView, kind: Kind) -> None:
    """Remove the attention or the FFN from a block in place, with the norms that serve it alone."""
    family = pruned_family(stock_type(view.model.config.model_type))
    serving = norms(view, kind)
    if family.form == "sizes":
        family.modeling.skip(block.module, kind, shared=set(family.norms[kind]) - set(serving))
        return
    if kind == "mlp":
        check_can_be_skipped(block)
    first, *other_projections = parts(block, kind)
    family.modeling.skip(block.module, first, kind)
    for name in (*other_projections, *serving):
        setattr(block.module, name, nn.Identity())


@torch.no_grad()
def check_can_be_skipped(block: BlockView) -> None:
    """Refuse an FFN that cannot be removed as a whole.

    Raises:
        UnsupportedModelError: the block expects more of its mixture of experts than a hidden state (GPT-OSS).
    """
    if block.experts is None:
        return
    example = block.experts.expert(0).output.weight
    if isinstance(block.experts.module.forward(example.new_zeros(1, 1, block.experts.hidden)), tuple):
        raise UnsupportedModelError(
            f"block {block.index}: its mixture of experts ({type(block.experts.module).__name__}) gives its block more "
            "than a hidden state, so it cannot go as a whole; use pruner.submodules=attention, or a pruner of neurons "
            "or experts"
        )


def _count(block: BlockView, names: tuple[str, ...]) -> int:
    return sum(parameter.numel() for name in names for parameter in getattr(block.module, name).parameters())


def _seen_norms(view: DecoderView) -> dict[Kind, tuple[str, ...]]:
    """Find the norms by one pass of four tokens through the first block that has both submodules."""
    complete_blocks = [b for b in view.blocks if b.ffn is not None and not b.attention_removed]
    if not complete_blocks:
        return dict.fromkeys(KINDS, ())
    block = complete_blocks[0]
    of_kind = {kind: parts(block, kind) for kind in KINDS}
    with _Answered(), _experts_aside(view):
        entry = BlockDriver(view, 1).entry(torch.arange(4)[None])
    with (
        watched(block.module) as seen,
        torch.no_grad(),
        view.weights.resident(block),
        _experts_aside(view),
        _Answered(),
    ):
        run_block(block, entry.hidden[0], entry.kwargs[block.index][0])
    norms_by_kind = served(seen, of_kind)
    if entry.hidden[0].is_meta:  # Meta tensors have no values.
        return norms_by_kind
    with torch.no_grad(), view.weights.resident(block), _experts_aside(view):
        return {kind: _alone(view, block, kind, names, entry) for kind, names in norms_by_kind.items()}


def _alone(view: DecoderView, block: BlockView, kind: Kind, names: tuple[str, ...], entry: Entry) -> tuple[str, ...]:
    """Return the norms of ``names`` whose removal changes nothing once the submodule is removed.

    BLOOM and MiniMax may add the residual behind a norm: such a norm serves more than the submodule that it feeds. The
    bias of a post-norm still has an effect after the submodule is removed.
    """
    if not names:
        return ()
    clone = clone_module(block.module)
    family = pruned_family(stock_type(view.model.config.model_type))
    if family.form == "sizes":
        family.modeling.skip(clone, kind, shared=set(names))
    else:
        first, *other_projections = parts(block, kind)
        family.modeling.skip(clone, first, kind)
        for name in other_projections:
            setattr(clone, name, nn.Identity())
    kwargs = entry.kwargs[block.index][0]
    hidden = torch.randn(entry.hidden[0].shape, generator=torch.Generator().manual_seed(0)).to(entry.hidden[0])
    try:
        expected = output_hidden(clone(hidden.clone(), **kwargs))
    except (ValueError, TypeError):
        # The mixture of GPT-OSS returns two values. It cannot be removed, and check_can_be_skipped refuses it.
        return names
    alone = []
    for name in names:
        norm = getattr(clone, name)
        setattr(clone, name, nn.Identity())
        if torch.equal(output_hidden(clone(hidden.clone(), **kwargs)), expected):
            alone.append(name)
        setattr(clone, name, norm)
    return tuple(alone)


class _Answered(TorchFunctionMode):
    """Make the truth value of meta tensors True, because models test conditions such as ``mask.all()``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def _experts_aside(view: DecoderView) -> Iterator[None]:
    """Let the experts of mixtures return zeros, because the meta device has no values to route tokens by."""
    with ExitStack() as stack:
        for mixture in (block.experts for block in view.blocks if block.experts is not None):
            # Experts that are modules are called by the mixture's own loop over them.
            aside = mixture.experts if mixture.fused else mixture.module
            stack.enter_context(replace_forward(aside, lambda states, *_, **__: torch.zeros_like(states)))
        yield
