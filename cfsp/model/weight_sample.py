"""Cheap check of content: a hash of some values of every matrix, for models that are already in memory.

A model in memory has no fingerprint of a folder, and that would not notice edited weights. The sample tells another
or an edited model from the base of a plan without reading all of it.
"""

from __future__ import annotations

import hashlib

from cfsp.architecture.block_sample import block_sample
from cfsp.architecture.views import DecoderView


def weight_sample(view: DecoderView) -> str:
    """Return the sha256 of 256 evenly spaced values of each FFN and attention matrix.

    The values are hashed as bfloat16, so that the dtype of the model does not matter.
    """
    digest = hashlib.sha256()
    for block in view.blocks:
        sample = view.weights.sample(block)
        if sample is None:
            with view.weights.resident(block):
                sample = block_sample(block)
        digest.update(sample)
    return f"sample:{digest.hexdigest()[:32]}"
