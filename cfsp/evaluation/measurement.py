"""One measured figure with everything that a reader needs to compare it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: The sentence for a perplexity whose detail has ``lacks_bos``.
LACKS_BOS = "windows lack the BOS that the tokenizer adds by itself"
#: The sentence for a task whose detail has ``truncated`` above 0.
TRUNCATED = "requests longer than the model's positions were cut on the left"


@dataclass(frozen=True)
class Measurement:
    """``suite``: perplexity, zero_shot or cost; ``n``: items, predicted tokens or timings.

    ``seq_len``: tokens a window, prompt or item may have; ``version``: of the task, or of the text by content. A field
    that does not apply is None, and null in the record. ``limit``: items of a task, or a share of them below 1.
    ``detail``: more of a suite. Of perplexity ``bos`` as settled, and ``lacks_bos``; of zero_shot ``truncated``
    (requests that were cut on the left) and, of a group, its ``members``.
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
        return (self.suite, self.task, self.metric)

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)
