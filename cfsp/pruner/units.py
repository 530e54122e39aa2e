"""Units that pruners remove: their counts in the blocks that a budget leaves free, and why heads may have to stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.architecture.latent import has_latent_attention

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.config.budget import Budget


def free_blocks(view: DecoderView, budget: Budget) -> list[BlockView]:
    """Return the blocks that may be pruned.

    Raises:
        ConfigError: every block is protected.
    """
    return [view.blocks[index] for index in budget.free_blocks(len(view.blocks))]


def count_neurons(view: DecoderView, budget: Budget) -> int:
    """Count FFN neurons; a mixture counts the neurons of every expert."""
    return sum(block.units("neurons").n * max(1, block.units("experts").n) for block in free_blocks(view, budget))


def count_kv_groups(view: DecoderView, budget: Budget) -> int:
    """Count the KV groups of all attentions that are recognised."""
    return sum(block.units("kv_groups").n for block in free_blocks(view, budget))


def count_experts(view: DecoderView, budget: Budget) -> int:
    """Count the routed experts of all mixtures."""
    return sum(block.units("experts").n for block in free_blocks(view, budget))


def block_sizes(view: DecoderView) -> list[int]:
    """Return the number of parameters of each block of the model."""
    return [sum(parameter.numel() for parameter in block.module.parameters()) for block in view.blocks]


def blocks_with_attention(view: DecoderView) -> set[int]:
    """Return the indices of the blocks that still have attention; at least one of them must stay."""
    return {block.index for block in view.blocks if not block.attention_removed}


def why_heads_stay(view: DecoderView) -> str | None:
    """Say why KV groups cannot be removed from a model; None where they can."""
    for block in view.blocks:
        if block.attention is not None and block.attention.fixed:
            return f"the heads of block {block.index} cannot be taken apart: {block.attention.fixed}"
        if block.attention is None and not block.attention_removed:
            if has_latent_attention(block.module):
                return f"block {block.index} has multi-head latent attention, whose heads share one latent"
            return (
                f"block {block.index} has no attention that is recognised (q_proj, k_proj, v_proj or a fused qkv, and "
                "an output projection, of whole heads)"
            )
    return None
