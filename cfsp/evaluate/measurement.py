"""One measured figure with everything that a reader needs to compare it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """``suite``: perplexity, zero_shot or cost; ``n``: items or tokens; None where a field does not apply."""

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
        """Without the fields that do not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}
