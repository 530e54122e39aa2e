"""The requested sparsity budget: a ratio of a scope, legal widths, protected blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cfsp.errors import ConfigError

#: Parameters that a ratio refers to.
Scope = Literal["ffn", "decoder", "model"]
#: Rule that makes widths whole.
Rounding = Literal["exact", "nearest"]
#: Units that a pruner ranks.
Structure = Literal["ffn", "heads", "heads_ffn", "experts"]
#: Blocks that stay whole: (first, last) blocks by number, or a rule.
Protect = Literal["none", "auto"] | tuple[int, int]

#: Number of blocks from which the first 4 and last 2 blocks stay whole, as in LLM-Pruner's README.
_DEEP = 24


@dataclass(frozen=True)
class Budget:
    """Request to remove ``ratio`` of the parameters of ``scope``.

    Legal FFN widths of a block are the multiples of ``round_to`` from ``min_width`` up, and the block's own width.
    Every number of KV groups from 1 up is legal.

    Attributes:
        ratio: share of the parameters of the scope to remove, 0 < ratio < 1.
        scope: ffn: the parameters of the FFN neurons; decoder: all parameters in the blocks; model: all parameters.
        round_to: step between legal widths, in neurons.
        rounding: rule that makes widths whole, see :func:`to_widths`.
        min_width: smallest width of a block; None: ``round_to``.
        protect: numbers of first and last blocks that stay whole; auto: (4, 2) from 24 blocks on, else (1, 1).
    """

    ratio: float
    scope: Scope = "ffn"
    round_to: int = 32
    rounding: Rounding = "exact"
    min_width: int | None = None
    protect: Protect = "none"

    def free_blocks(self, n_blocks: int) -> list[int]:
        """Return the indices of the blocks that may be pruned.

        Raises:
            ConfigError: every block is protected.
        """
        first, last = (0, 0) if self.protect == "none" else self._ends(n_blocks)
        free = list(range(first, n_blocks - last))
        if not free:
            raise ConfigError(
                f"sparsity.protect={self.shown_protect()}: leaves no block of {n_blocks} to prune; use smaller "
                "numbers or none"
            )
        return free

    def _ends(self, n_blocks: int) -> tuple[int, int]:
        if isinstance(self.protect, tuple):
            return self.protect
        return (4, 2) if n_blocks >= _DEEP else (1, 1)

    def shown_protect(self) -> str:
        """Return ``protect`` in the notation of the command line."""
        return self.protect if isinstance(self.protect, str) else f"[{self.protect[0]},{self.protect[1]}]"

    def requested(self) -> dict[str, Any]:
        """Return the request in the form that the plan stores."""
        return {
            "ratio": self.ratio,
            "scope": self.scope,
            "round_to": self.round_to,
            "rounding": self.rounding,
            "min_width": self.min_width or self.round_to,
            "protect": self.protect if isinstance(self.protect, str) else list(self.protect),
        }
