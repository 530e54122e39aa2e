"""Multi-head latent attention: all heads share one compressed key and value, so there are no KV heads to remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def has_latent_attention(block: nn.Module) -> bool:
    """Return whether a block's keys and values come from one latent vector (DeepSeek-V2, arXiv 2405.04434)."""
    return any(hasattr(module, "kv_b_proj") and hasattr(module, "o_proj") for module in block.modules())
