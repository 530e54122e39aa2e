"""Log-likelihood requests of the harness on a model whose weights stay on disk: each block is read once for all.

The harness asks for the logits of one batch after the other. Here it asks twice: the first time its batches are noted
and answered with nothing, then all of them go through the decoder block by block, and the second time the logits come
from the hidden states that are left. Batches and their order are the harness's own both times. Rolling requests are
asked twice as a whole, because the harness takes their windows batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from cfsp.architecture.views import resolve
from cfsp.model.driver import BlockDriver

if TYPE_CHECKING:
    from cfsp.model.streamed import StreamedWeights


class BlockByBlock(HFLM):
    """``HFLM`` for the model of ``store``; generation still reads the whole model for each token."""

    def __init__(self, store: StreamedWeights, **settings: Any) -> None:
        super().__init__(pretrained=store.model, **settings)
        self._store = store
        self._device = store.device  # the parameters themselves are nowhere
        self._noted: list[Tensor] | None = None
        self._answers: Any = None

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        ask = super().loglikelihood_rolling
        return self._asked_twice(lambda quiet: ask(requests, disable_tqdm=quiet or disable_tqdm))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        ask = super()._loglikelihood_tokens
        if self._noted is not None or self._answers is not None:  # one batch of windows, whose bar is that of all
            return ask(requests, disable_tqdm=True, override_bs=override_bs)
        return self._asked_twice(
            lambda quiet: ask(requests, disable_tqdm=quiet or disable_tqdm, override_bs=override_bs)
        )

    def _asked_twice(self, ask: Callable[[bool], Any]) -> Any:
        """What ``ask``, given whether to be quiet, comes to with the logits of all its batches."""
        self._noted = []
        try:
            ask(True)
            batches = self._noted
        finally:
            self._noted = None
        driver = BlockDriver(resolve(self._store.model), self.batch_size)
        hidden = driver.hidden_states()
        if batches:
            for step in driver.steps(batches, "zero-shot"):
                hidden = step.advance()
        self._answers = zip(batches, hidden, strict=True)
        try:
            with torch.no_grad(), self._store.resident_rest():
                self._logits = driver.logits
                return ask(False)
        finally:
            self._answers = None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._noted is not None:
            self._noted.append(inps)
            # One vocabulary of zeros, seen as [B, T, V].
            vocabulary = self._store.model.get_output_embeddings().weight.shape[0]
            return torch.zeros(1, 1, vocabulary, device=self._device).expand(*inps.shape, -1)
        if self._answers is None:
            return super()._model_call(inps, attn_mask, labels)
        batch, hidden = next(self._answers)
        assert torch.equal(batch, inps)
        return self._logits(batch, hidden)
