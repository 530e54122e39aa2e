"""A recovery of six steps, for tests to add to a sound command line."""

from __future__ import annotations

TRAINS = ["recovery.max_steps=6", "recovery.batch_size=4", "recovery.micro_batch_size=2", "recovery.cutoff=32",
          "recovery.log_every=1", "save.dtype=float32", "save.model=true"]  # fmt: skip
