"""Weights of a model behind one interface, whether they are in memory or streamed from disk.

``DecoderView.weights`` answers "where are the weights?": code that runs a block asks it for the block, and does not ask
where the block comes from. :class:`cfsp.model.streamed.StreamedWeights` is the other implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.system.progress import progress

if TYPE_CHECKING:
    from cfsp.architecture.views import BlockView, DecoderView
    from cfsp.model.hidden_states import SpillBuffer
    from cfsp.plan.pruning_plan import BlockPlan

#: Attribute under which a model carries weights that are not in memory.
_ATTRIBUTE = "_cfsp_weights"
#: Most bytes of logits that a CPU computes in one forward pass, where a pass has more than one window. With 49,152
#: entries, four windows of 1,024 tokens would have 800 MB of them.
_LOGITS_BYTES = 2**28


class Weights:
    """Weights of a model in memory.

    Attributes:
        model: the model.
        is_streamed: the weights stay on disk, and each pass over the blocks reads all of them.
        spill: limit of the hidden states between two blocks; None: they stay on ``device``.
    """

    is_streamed = False
    spill: SpillBuffer | None = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """Device of token ids, which is that of the embeddings."""
        return self.model.get_input_embeddings().weight.device

    @contextmanager
    def resident(self, block: BlockView) -> Iterator[None]:
        """Hold the parameters of ``block`` in memory inside."""
        yield

    @contextmanager
    def resident_rest(self) -> Iterator[None]:
        """Hold the parameters that belong to no block and not to the embedding (final norm, head) in memory inside."""
        yield

    def resident_bytes(self, blocks: Sequence[BlockView]) -> int:
        """Return the bytes of weights on ``device`` during a pass over ``blocks``."""
        device = self.device
        return sum(weight.nbytes for weight in self.model.parameters() if weight.device == device)

    def sample(self, block: BlockView) -> bytes | None:
        """Return the content sample of a block as it is stored, if it was computed when the block was read.

        :func:`cfsp.architecture.block_sample.block_sample` computes it.
        """
        return None

    def follow(
        self, view: DecoderView, decisions: Sequence[BlockPlan] | None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take notice that the modules were sliced; weights in memory were sliced with them.

        Args:
            view: the model with the blocks that stay.
            decisions: the units of each block of the base model that stay; None: all.
            tensors: the plan's replaced tensors.
        """

    @torch.no_grad()
    def logits(self, windows: Tensor, batch_size: int, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield token ids [b, T] and logits [b, T, V] of all windows in order, batch after batch.

        Args:
            windows: token ids, [n, T].
            batch_size: windows at a time, and fewer on a CPU where their logits would take more than 256 MiB.
            label: text of the progress line.
        """
        device = self.device
        if device.type == "cpu":
            entries, width = self.model.get_output_embeddings().weight.shape[0], self.model.dtype.itemsize
            batch_size = max(1, min(batch_size, _LOGITS_BYTES // (windows.shape[1] * entries * width)))
        for batch in progress(windows.split(batch_size), label, unit="batch"):
            ids = batch.to(device)
            yield ids, self.model(ids, use_cache=False).logits

    @torch.no_grad()
    def greedy(self, ids: Tensor, steps: int, choose: Callable[[Tensor], Tensor], label: str) -> Iterator[Tensor]:
        """Yield the logits of sequences, then those after each token that continues them, for ``steps`` tokens at most.

        Weights on disk give the first logits alone, since each further token would read all of them again.

        Args:
            ids: token ids, [n, T].
            steps: number of logits in all.
            choose: gives the next token [n] from logits, whose last position decides.
            label: text of the progress line.

        Yields:
            Logits [n, t, V] on the device of the head; t is T at first.
        """
        device, tokens = self.device, []
        ids = ids.to(device)
        output = self.model(ids, use_cache=True)
        for step in range(steps):
            yield output.logits
            if step + 1 == steps:
                return
            tokens.append(choose(output.logits).to(device))
            past = getattr(output, "past_key_values", None)
            if past is None:  # RecurrentGemma does not return its states, so all tokens are run again
                output = self.model(torch.cat([ids, torch.stack(tokens, dim=1)], dim=1), use_cache=False)
            else:
                output = self.model(tokens[-1][:, None], past_key_values=past, use_cache=True)

    def head_inputs(self, ids: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a forward pass whose blocks are skipped, so that only the head computes.

        Args:
            ids: token ids, [B, T].
            hidden: the hidden states that enter the head, [B, T, d].
        """
        return {"input_ids": ids}

    def limit_hidden_states(self, buffer: Callable[[], SpillBuffer]) -> None:
        """Bound the memory of hidden states between two blocks; those of a model in memory stay on its device.

        Args:
            buffer: makes the limit; it is called only where there is one.
        """

    def round_to(self, dtype: torch.dtype) -> bool:
        """Round the values to a narrower dtype, as a checkpoint of it would hold them.

        Returns:
            True where values in memory were rounded, so that some may not be finite any more.
        """
        narrowed = [
            parameter
            for parameter in self.model.parameters()
            if parameter.is_floating_point() and torch.finfo(dtype).bits < torch.finfo(parameter.dtype).bits
        ]
        with torch.no_grad():
            for parameter in narrowed:
                parameter.copy_(parameter.to(dtype))
        return bool(narrowed)


def weights_of(model: Any) -> Weights:
    """Return the weights of a model."""
    carried: Weights | None = getattr(model, _ATTRIBUTE, None)
    return Weights(model) if carried is None else carried


def carry(model: Any, weights: Weights) -> None:
    """Let ``model`` carry weights that are not in memory."""
    object.__setattr__(model, _ATTRIBUTE, weights)
