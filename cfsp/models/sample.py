"""A cheap check of content: a hash of some values of every matrix, for models that are already in memory.

A folder's fingerprint cannot be asked of a model in memory, and says nothing once somebody edited the weights; this
tells another model, or an edited one, from the base of a plan without reading all of it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cfsp.models.experts import ExpertsFFN
from cfsp.models.projection import distinct
from cfsp.models.streamed import resident, streamed
from cfsp.models.views import BlockView, DecoderView

_VALUES = 256


def weight_sample(view: DecoderView) -> str:
    """sha256 of 256 evenly spaced values of each FFN and attention matrix, in bfloat16 so that no dtype matters."""
    digest = hashlib.sha256()
    store = streamed(view.model)
    for block in view.blocks:
        known = None if store is None else store.samples.get(store.origin(block))
        if known is None:
            with resident(view, block):
                known = block_sample(block)
        digest.update(known)
    return f"sample:{digest.hexdigest()[:32]}"


def block_sample(block: BlockView) -> bytes:
    """The part of one block in :func:`weight_sample`."""
    found = b""
    for matrix in _matrices(block):
        flat = matrix.detach().flatten()
        at = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to("cpu", torch.bfloat16)
        found += f"{tuple(matrix.shape)}".encode() + values.view(torch.int16).numpy().tobytes()
    return found


def _matrices(block: BlockView) -> list[Tensor]:
    """As they are stored, fused ones once."""
    single = [part for part in (block.ffn, block.attention) if part is not None and not isinstance(part, ExpertsFFN)]
    found: list[Tensor] = [one.parameter for one in distinct([p for part in single for p in part.projections.values()])]
    if block.experts is None:
        return found
    experts = [getattr(module, name) for module, name in block.experts.stored()]
    return [*experts, block.experts.router.weight, *found]
