"""Batch size of the calibration pass: the fastest number of sequences that fits into memory.

The number is the same whenever the same model is calibrated on the same machine. It is part of the name under which
results, and the remains of a killed calibration, are kept, so it must not depend on the memory that happens to be free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cfsp.system.memory import capacity

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView

BatchSize = int | Literal["auto"]

#: Most tokens in a batch. More are no faster: activations no longer fit into CPU caches, and a GPU is already busy.
_TOKENS = {"cpu": 2048, "other": 16384}
#: Share of the memory beside the weights that one batch may take.
_SHARE_OF_MEMORY = 0.5


def batch_size(requested: BatchSize, view: DecoderView, seq_len: int) -> int:
    """Return the number of sequences of ``seq_len`` tokens to run at a time, at least 1.

    Args:
        requested: the number of sequences, or "auto" for one that suits device and memory.
    """
    if requested != "auto":
        return requested
    preferred = _TOKENS.get(view.device.type, _TOKENS["other"]) // seq_len
    # In a block at once: a few hidden states, and in the FFN gate, up and their product.
    hidden = view.model.get_input_embeddings().weight.shape[-1]
    widths = [n * (1 if b.experts is None else b.experts.top_k) for b, n in zip(view.blocks, view.widths, strict=True)]
    per_token = (6 * hidden + 3 * max(widths)) * view.model.dtype.itemsize
    beside_weights = capacity(view.device) - view.weights.resident_bytes(view.blocks)
    fitting = int(_SHARE_OF_MEMORY * beside_weights) // (per_token * seq_len)
    return max(1, min(preferred, fitting))
