"""Perplexity on texts: windows, joining and BOS as published, with a token-weighted mean NLL."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field, PlainValidator

from cfsp.config.components import component, suggest, with_key
from cfsp.config.contracts import Evaluator
from cfsp.config.deciding import Decides, deciding_settings
from cfsp.config.sections import TextSection
from cfsp.errors import DataError, RunError
from cfsp.evaluation.measurement import LACKS_BOS, Measurement
from cfsp.evaluation.values import validate_batch_size, validate_windows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from cfsp.data.limits import Limits

log = logging.getLogger(__name__)


@component
class Perplexity(Evaluator):
    """Perplexity: exp of the mean NLL per predicted token over non-overlapping windows.

    Each window is scored on its own and its first token is not predicted. The incomplete window at the end is dropped.

    Attributes:
        datasets: names of the texts to evaluate.
        texts: texts by name.
        seq_len: tokens of a window.
        windows: [first, end) of the windows to evaluate; None: all.
        batch_size: windows at a time.
    """

    datasets: Annotated[list[str], Field(min_length=1)]
    texts: Annotated[dict[str, TextSection], Decides(chosen_by="datasets")]
    seq_len: Annotated[int, Field(ge=2)]
    windows: Annotated[tuple[int, int] | None, PlainValidator(validate_windows)] = None
    batch_size: Annotated[int, PlainValidator(validate_batch_size)] = 8

    side_by_side: ClassVar[bool] = False
    key: ClassVar[str] = "evaluation.perplexity"

    def __post_init__(self) -> None:
        for name in self.datasets:
            if name not in self.texts:
                raise ValueError(
                    f"{self.key}.datasets names {name}, which is not defined{suggest(name, self.texts)}; "
                    f"defined: {', '.join(self.texts)}"
                )
        if self.windows is not None and self.windows[0] >= self.windows[1]:
            raise ValueError(
                f"{self.key}.windows=[{self.windows[0]},{self.windows[1]}]: [first,end] with first < end is needed"
            )

    def check(self, tokenizer: Any, limits: Limits) -> dict[str, Any]:
        """Check texts, windows and token ids; see :meth:`cfsp.config.contracts.Evaluator.check`."""
        # Start-up time: loads numpy.
        from cfsp.data.text import lacks_added_tokens, locate_text

        limits.check_length(f"{self.key}.seq_len", self.seq_len)
        for name in self.datasets:
            windows, _ = self._cut_windows(name, tokenizer)
            limits.check_ids(f"{self.key} ({name})", windows)
            section = self._section(name, tokenizer)
            if lacks_added_tokens(section, tokenizer):
                log.warning(
                    "%s (%s): %s (bos=%s), so the figure may be far from what the model can do; %s.bos=auto adds it",
                    self.key, name, LACKS_BOS, section.bos, self._key(name),
                )  # fmt: skip
        sections = {name: self._section(name, tokenizer) for name in self.datasets}
        texts = {name: locate_text(section, self._key(name)).identity for name, section in sections.items()}
        return deciding_settings(self) | {"texts": texts}

    def parts(self) -> dict[str, Perplexity]:
        """Divide the evaluator by text."""
        return {name: with_key(replace(cast(Any, self), datasets=[name]), self.key) for name in self.datasets}

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        """Measure the perplexity on each text."""
        return [self._measure(name, model, tokenizer) for name in self.datasets]

    def _measure(self, name: str, model: nn.Module, tokenizer: Any) -> Measurement:
        import torch

        # Start-up time: loads numpy.
        from cfsp.data.text import lacks_added_tokens, locate_text

        windows, first = self._cut_windows(name, tokenizer)
        version = f"sha256:{locate_text(self.texts[name], self._key(name)).identity['sha256'][:16]}"
        total, count = negative_log_likelihood(model, torch.tensor(windows), self.batch_size, name)
        if not math.isfinite(total):
            raise RunError(f"perplexity on {name} is not finite; try model.dtype=float32")
        section = self._section(name, tokenizer)
        bos_detail = {"lacks_bos": True} if lacks_added_tokens(section, tokenizer) else {}
        return Measurement(
            "perplexity", name, "perplexity", math.exp(total / count), "perplexity per token",
            n=count, seq_len=self.seq_len, split=section.split, num_fewshot=0, version=version,
            detail={
                "windows": [first, first + len(windows)], "nll": total / count,
                "bos": section.bos, "join": section.join, **bos_detail,
            },
        )  # fmt: skip

    def _cut_windows(self, name: str, tokenizer: Any) -> tuple[np.ndarray, int]:
        """Return the windows of a text to evaluate, [n, T], and the index of the first of them."""
        # Start-up time: loads numpy.
        from cfsp.data.text import cut_windows, locate_text, read_text, tokenise, window_bos_id

        section, key = self._section(name, tokenizer), self._key(name)
        ids = tokenise(read_text(locate_text(section, key)), tokenizer, section.bos)
        windows = cut_windows(ids, self.seq_len, bos_id=window_bos_id(tokenizer, section.bos, key))
        first, end = self.windows or (0, len(windows))
        if not len(windows) or end > len(windows):
            requested = "" if self.windows is None else f" for {self.key}.windows=[{first},{end}]"
            raise DataError(
                f"{self.key} ({name}): the text has {len(windows)} windows of {self.seq_len} tokens, "
                f"{max(end, 1)} are needed{requested}; use a longer text or a smaller {self.key}.seq_len"
            )
        return windows[first:end], first

    def _section(self, name: str, tokenizer: Any) -> TextSection:
        """Return the settings of a text, with ``bos=auto`` resolved for the tokenizer."""
        # Start-up time: loads numpy.
        from cfsp.data.text import resolve_bos

        return resolve_bos(self.texts[name], tokenizer)

    def _key(self, name: str) -> str:
        return f"{self.key}.texts.{name}"


def negative_log_likelihood(model: nn.Module, windows: Tensor, batch_size: int, label: str) -> tuple[float, int]:
    """Sum the NLL of the tokens 1..T-1 of each window, with the log-softmax in float32.

    Args:
        model: the model, in memory or streamed.
        windows: token ids, [n, T].
        batch_size: windows at a time.
        label: name of the text, for the progress bar.

    Returns:
        The sum in nats, and the number of predicted tokens.
    """
    import torch

    # Start-up time: loads torch.
    from cfsp.architecture.weights import weights_of
    from cfsp.model.nll import sequence_nll

    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for ids, logits in weights_of(model).logits(windows, batch_size, f"perplexity {label}"):
            for nll in sequence_nll(logits, ids):
                total += nll
            del logits  # otherwise they stay in memory while the next batch is computed
    return float(total), windows.shape[0] * (windows.shape[1] - 1)
