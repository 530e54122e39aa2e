"""Measured figures, with everything that a reader needs to compare them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: Sentence for a perplexity whose detail has ``lacks_bos``.
LACKS_BOS = "windows lack the BOS that the tokenizer adds by itself"
#: Sentence for a task whose detail has ``truncated`` above 0.
TRUNCATED = "requests longer than the model's positions were cut on the left"


@dataclass(frozen=True)
class Measurement:
    """One measured figure. A field that does not apply is None, and null in the record.

    Attributes:
        suite: perplexity, zero_shot or cost.
        task: task or text.
        metric: name of the metric.
        value: the figure.
        unit: unit of the figure.
        n: items, predicted tokens or timings.
        stderr: standard error of the figure.
        seq_len: tokens that a window, prompt or item may have.
        split: split of the data.
        num_fewshot: number of examples before each item.
        version: version of the task, or hash of the text.
        limit: items of a task that were used, or below 1 a share of them.
        detail: further facts of a suite. Perplexity: ``bos`` as settled, and ``lacks_bos``. Zero-shot: ``truncated``
            (requests that were cut on the left) and, for a group, its ``members``.
    """

    suite: str
    task: str
    metric: str
    value: float
    unit: str
    n: int | None = None
    stderr: float | None = None
    seq_len: int | None = None
    split: str | None = None
    num_fewshot: int | None = None
    version: str | None = None
    limit: int | float | None = None
    detail: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Return the suite, task and metric, which identify the figure within a side."""
        return (self.suite, self.task, self.metric)

    def as_dict(self) -> dict[str, Any]:
        """Return the figure as the record holds it."""
        return asdict(self)
