"""Hash of some values of every matrix, a cheap fingerprint of a model in memory.

A model in memory may come from no folder, and its weights may have been edited since they were loaded, so the
fingerprint of a folder does not serve. The hash distinguishes the base model of a plan from other or edited models
without reading all weights.
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
