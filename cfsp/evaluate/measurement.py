"""One measured figure with everything that a reader needs to compare it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """``suite``: perplexity, zero_shot or cost; ``n``: items, predicted tokens or timings.

    ``seq_len``: tokens a window, prompt or item may have; ``version``: of the task, or of the text by content. A field
    that does not apply is None, and null in the record.
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
    limit: int | None = None
    detail: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.suite, self.task, self.metric)

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)
