"""Log-likelihood requests of the harness on a streamed model, where each block is read once for all requests.

The harness asks for the logits of one batch after the other. Here its requests are run twice. In the first run the
batches are recorded, and the logits returned are zeros. All batches then go through the decoder block by block. In the
second run the logits are computed from the resulting hidden states. The harness chooses the batches and their order in
both runs. Rolling requests are run twice as a whole, because the harness processes their windows batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from cfsp.architecture.views import resolve
from cfsp.architecture.weights import weights_of
from cfsp.model.driver import BlockDriver

if TYPE_CHECKING:
    from cfsp.architecture.weights import Weights


def build_harness(model: Any, **settings: Any) -> HFLM:
    """Build the harness's model object from a model in memory or a streamed one."""
    weights = weights_of(model)
    return BlockByBlock(weights, **settings) if weights.is_streamed else HFLM(pretrained=model, **settings)


class BlockByBlock(HFLM):
    """``HFLM`` for a streamed model; generation still reads the whole model for each token."""

    def __init__(self, store: Weights, **settings: Any) -> None:
        super().__init__(pretrained=store.model, **settings)
        self._store = store
        self._device = store.device  # the parameters are on the meta device
        self._recorded_batches: list[Tensor] | None = None
        self._batches_with_hidden: Any = None

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Return the log-likelihoods of whole texts; see :meth:`lm_eval.api.model.LM.loglikelihood_rolling`."""
        compute = super().loglikelihood_rolling
        return self._run_twice(lambda quiet: compute(requests, disable_tqdm=quiet or disable_tqdm))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        compute = super()._loglikelihood_tokens
        if (
            self._recorded_batches is not None or self._batches_with_hidden is not None
        ):  # rolling requests are being run twice as a whole
            return compute(requests, disable_tqdm=True, override_bs=override_bs)
        return self._run_twice(
            lambda quiet: compute(requests, disable_tqdm=quiet or disable_tqdm, override_bs=override_bs)
        )

    def _run_twice(self, compute: Callable[[bool], Any]) -> Any:
        """Run requests twice, and return the result of the second run, which has the true logits.

        Args:
            compute: runs the requests; its argument is True to hide the progress bar.
        """
        self._recorded_batches = []
        try:
            compute(True)
            batches = self._recorded_batches
        finally:
            self._recorded_batches = None
        driver = BlockDriver(resolve(self._store.model), self.batch_size)
        hidden = driver.final_hidden_states(batches, "zero-shot") if batches else driver.hidden_states()
        self._batches_with_hidden = zip(batches, hidden, strict=True)
        try:
            with torch.no_grad(), self._store.resident_rest():
                self._logits = driver.logits
                return compute(False)
        finally:
            self._batches_with_hidden = None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._recorded_batches is not None:
            self._recorded_batches.append(inps)
            # One row of zeros, expanded to [B, T, V] without taking memory.
            vocabulary = self._store.model.get_output_embeddings().weight.shape[0]
            return torch.zeros(1, 1, vocabulary, device=self._device).expand(*inps.shape, -1)
        if self._batches_with_hidden is None:
            return super()._model_call(inps, attn_mask, labels)
        batch, hidden = next(self._batches_with_hidden)
        assert torch.equal(batch, inps)
        return self._logits(batch, hidden)
