"""Limits of a model: vocabulary and positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cfsp.errors import DataError


@dataclass(frozen=True)
class Limits:
    """Limits of a model.

    Attributes:
        vocab_size: number of token ids; ids must be smaller.
        positions: most tokens of a window; None: unknown.
    """

    vocab_size: int
    positions: int | None

    def check_length(self, key: str, seq_len: int) -> None:
        """Check the length of a window.

        Args:
            key: configuration key of the length.
            seq_len: tokens of a window.

        Raises:
            DataError: the window is longer than the model's positions.
        """
        if self.positions is not None and seq_len > self.positions:
            raise DataError(f"{key}={seq_len}: the model has {self.positions} positions; use {self.positions} or less")

    def check_ids(self, source: str, ids: np.ndarray) -> None:
        """Check token ids.

        Args:
            source: name of the input, for the message.
            ids: token ids of any shape.

        Raises:
            DataError: an id is outside the model's vocabulary.
        """
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"{source}: ids from {low} to {high} are outside the model's vocabulary of {self.vocab_size}; "
                "tokenise with this model's tokenizer"
            )
