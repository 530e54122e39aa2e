"""Upper bounds of numbers in a configuration, far above any use, so that no key demands unbounded memory or time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

#: Largest whole number of any key that has no bound of its own.
LARGEST_INTEGER = 2**31 - 1
#: Largest finite number of any key.
LARGEST_NUMBER = 1e12
#: Largest seed that numpy and torch accept.
LARGEST_SEED = 2**32 - 1
#: Most tokens of one calibration set or of sampled recovery data: 2 GB of ids.
LARGEST_TOKENS = 2**28

#: Last part of a key -> its largest value.
_LARGEST = {
    "seed": LARGEST_SEED,
    "n_samples": 100_000_000,
    "search_sequences": 100_000_000,
    "max_documents": 2**40,
    "skip_documents": 2**40,
    "seq_len": 16_777_216,
    "cutoff": 16_777_216,
    "prompt_tokens": 16_777_216,
    "new_tokens": 16_777_216,
    "batch_size": 1_000_000,
    "micro_batch_size": 1_000_000,
    "sampling_batch_size": 1_000_000,
    "max_steps": 100_000_000,
    "warmup_steps": 100_000_000,
    "epochs": 100_000,
    "repeats": 100_000,
    "num_fewshot": 10_000,
    "newton_steps": 10_000,
    "cg_iterations": 1_000_000,
    "evaluations": 100_000_000,
    "memory_gb": 1_000_000,
}


def too_large(values: Any, key: str = "") -> Iterator[tuple[str, Any, int | float]]:
    """Yield (key, value, largest value) for every number that exceeds the bound of its key.

    Args:
        values: a configuration or a part of it; ``model.architecture``, which holds sizes of a model, is skipped.
        key: the key under which ``values`` stands.
    """
    if isinstance(values, Mapping):
        for name, inner in values.items():
            inner_key = f"{key}.{name}" if key else str(name)
            if inner_key != "model.architecture":
                yield from too_large(inner, inner_key)
    elif isinstance(values, list | tuple):
        for at, inner in enumerate(values):
            yield from too_large(inner, f"{key}[{at}]")
    elif isinstance(values, int | float) and not isinstance(values, bool):
        largest = _LARGEST.get(key.rpartition(".")[2], LARGEST_INTEGER if isinstance(values, int) else LARGEST_NUMBER)
        if (isinstance(values, int) or math.isfinite(values)) and abs(values) > largest:
            yield key, values, largest
