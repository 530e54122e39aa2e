"""Tiny pruned models of every structure: widths, heads, submodules and blocks that are gone, biases."""

from __future__ import annotations

import torch

import cfsp
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from tests.helpers.tiny import tiny_model

SOME = (0, 3, 7, *range(20, 60))
GONE = BlockPlan(attention=False, ffn=False)
#: Blocks 0 to 4 of a model of 5.
STRUCTURES = {
    "widths": [BlockPlan(SOME), *[BlockPlan()] * 4],
    "heads": [BlockPlan(None, (1,)), BlockPlan(), BlockPlan(None, (0,)), *[BlockPlan()] * 2],
    "equal_heads": [BlockPlan(None, (1,))] * 5,
    "first_attention": [BlockPlan(attention=False), *[BlockPlan()] * 4],
    "attention": [BlockPlan(), BlockPlan(attention=False), BlockPlan(), BlockPlan(attention=False), BlockPlan()],
    "last_attention": [*[BlockPlan()] * 4, BlockPlan(attention=False)],
    "ffn": [BlockPlan(ffn=False), BlockPlan(), BlockPlan(), BlockPlan(ffn=False), BlockPlan()],
    "blocks": [GONE, BlockPlan(), GONE, BlockPlan(), BlockPlan()],
    "biases": [BlockPlan(SOME, (0,)), *[BlockPlan()] * 4],
    "everything": [
        BlockPlan(SOME, attention=False), BlockPlan(None, (1,), ffn=False), GONE, BlockPlan(SOME, (0,)), GONE,
    ],
}  # fmt: skip


def pruned(architecture: str, structure: str, **settings):
    blocks = tuple(STRUCTURES[structure])
    tensors = {}
    if structure in ("biases", "everything"):
        generator = torch.Generator().manual_seed(3)
        names = [f"blocks.{i}.ffn.bias" for i, b in enumerate(blocks) if b.ffn]
        names += [f"blocks.{i}.attention.bias" for i, b in enumerate(blocks) if b.attention]
        tensors = {name: torch.randn(32, generator=generator) for name in names[::2]}
    plan = PruningPlan("m", "f", {"name": "hand"}, blocks, {}, {}, tensors=tensors)
    return cfsp.apply(tiny_model(architecture, blocks=5, **settings), plan)


def logits(model, ids, **keys):
    with torch.no_grad():
        return model(ids, **keys).logits
