"""Pairs of inputs and target outputs of an FFN, to which a refit fits its matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cfsp.calibration.gram import HeldOutRows, subsample_tokens
from cfsp.calibration.inputs import watch_inputs

if TYPE_CHECKING:
    from cfsp.architecture.ffn import FFN
    from cfsp.architecture.views import BlockView
    from cfsp.model.hidden_states import HiddenStates


class FFNCapture:
    """Activations of an FFN in the last batch.

    Attributes:
        entering: input of the FFN [B, T, d].
        hidden: input of its output projection [B, T, N].
    """

    entering: Tensor
    hidden: Tensor


@contextmanager
def capturing_ffn(block: BlockView, ffn: FFN) -> Iterator[FFNCapture]:
    """Capture the activations of ``ffn`` inside ``with`` while ``block`` runs; the hooks are removed afterwards."""
    captured = FFNCapture()

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        captured.entering = args[0].detach()

    def leave(_: nn.Module, args: tuple[Any, ...]) -> None:
        captured.hidden = args[0].detach()

    removers: list[Callable[[], None]] = []
    try:
        removers += watch_inputs(block, next(iter(ffn.inputs.values())), enter)
        removers += watch_inputs(block, ffn.output, leave)
        yield captured
    finally:
        for remove in removers:
            remove()


class Pairs(Sequence[tuple[Tensor, Tensor]]):
    """Inputs [n, d] and targets [n, d_out] by batch, in memory or on disk (:class:`cfsp.model.hidden_states`)."""

    def __init__(self, inputs: HiddenStates, targets: HiddenStates) -> None:
        self._inputs, self._targets = inputs, targets

    def append(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs.append(inputs)
        self._targets.append(targets)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, batch: Any) -> Any:
        return self._inputs[batch], self._targets[batch]


class FFNPairs:
    """Pairs of an FFN from every ``stride``-th token of each sequence, split into pairs to fit to and pairs held out.

    Every fourth sequence is held out; with fewer than four sequences, every fourth of the tokens.
    """

    def __init__(self, sequences: int, stride: float, held: Callable[[], HiddenStates]) -> None:
        """Prepare to collect pairs from a number of sequences.

        Args:
            sequences: number of sequences to come.
            stride: distance between two tokens that are kept.
            held: makes an empty container of hidden states with bounded memory.
        """
        self.fitted, self.held_out = Pairs(held(), held()), Pairs(held(), held())
        self._stride, self._split = stride, HeldOutRows.among(sequences)

    def add(self, ffn: FFN, captured: FFNCapture, missing: Tensor | None) -> None:
        """Add the pairs of one batch.

        Args:
            missing: added to the output of the FFN to make the target, [B, T, d_out]; None: nothing.
        """
        entering, hidden = (
            subsample_tokens(captured.entering, self._stride),
            subsample_tokens(captured.hidden, self._stride),
        )
        targets = hidden @ ffn.output.weight.detach().T
        if ffn.output.bias is not None:
            targets = targets + ffn.output.bias.detach()
        if missing is not None:
            targets = targets + subsample_tokens(missing, self._stride).to(targets.dtype)
        out = self._split.mask(entering.shape[0], entering.shape[1], entering.device)
        # Picked by a mask, they are copies: a share of the tokens does not hold on to all of them.
        for pairs, which in ((self.fitted, ~out), (self.held_out, out)):
            if bool(which.any()):
                pairs.append(entering.flatten(0, 1)[which], targets.flatten(0, 1)[which])
