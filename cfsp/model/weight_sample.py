"""A cheap check of content: a hash of some values of every matrix, for models that are already in memory.

A folder's fingerprint cannot be asked of a model in memory, and says nothing once somebody edited the weights; this
tells another model, or an edited one, from the base of a plan without reading all of it.
"""

from __future__ import annotations

import hashlib

from cfsp.architecture.block_sample import block_sample
from cfsp.architecture.views import DecoderView
from cfsp.model.streamed import resident, streamed


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
