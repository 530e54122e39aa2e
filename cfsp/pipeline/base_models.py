"""Pool with the base model that several runs of one process prune. It is loaded once and restored after each run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.architecture.views import resolve
from cfsp.architecture.weights import weights_of
from cfsp.config.sections import SelfCalibration
from cfsp.model.hidden_states import SpillBuffer
from cfsp.model.load import load_model, load_streamed
from cfsp.model.snapshot import Snapshot
from cfsp.model.trial import try_blocks, try_model
from cfsp.pruner.probe import probe
from cfsp.system.memory import available

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.config.run_config import RunConfig
    from cfsp.pipeline.preflight import Prepared


#: Share of the free memory that the hidden states of a streamed model may take.
_SHARE_OF_MEMORY = 0.5


class BaseModels:
    """Pool that holds at most one base model and hands it to one run after the other."""

    def __init__(self, *, keep: bool = False) -> None:
        """Start with an empty pool.

        Args:
            keep: keep the last model in memory for the next run of the same model.
        """
        self._keep = keep
        self._kept: tuple[Any, Any] | None = None
        self._probed: set[tuple[bool, bool]] = set()
        self._tried = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the pool keeps in memory."""
        if self._kept is None:
            return 0
        return sum(p.numel() * p.element_size() for p in self._kept[1].parameters() if not p.is_meta)

    @contextmanager
    def acquire(self, prepared: Prepared) -> Iterator[tuple[Any, bool]]:
        """Yield the base model of a run inside the context and restore the model afterwards.

        Slicing replaces modules and parameters, which a snapshot undoes. The pool drops the model if the run failed or
        if values were written into shared parameters (a recovery, or rounding to a narrower dtype).

        Yields:
            The model, and whether it was in the pool already.
        """
        config = prepared.config
        key = (
            prepared.source.fingerprint,
            prepared.dtype,
            prepared.device,
            prepared.streaming,
            config.model.trust_remote_code,
        )
        kept, self._kept = self._kept, None  # the memory must never hold two base models
        is_same = kept is not None and kept[0] == key
        model: Any = kept[1] if kept is not None and is_same else None
        del kept
        if model is None:
            self._probed.clear()
            self._tried = False
            load = load_streamed if prepared.streaming else load_model
            model = load(
                prepared.source,
                dtype=prepared.dtype,
                device=prepared.device,
                trust_remote_code=config.model.trust_remote_code,
            )
        weights = weights_of(model)
        weights.limit_hidden_states(partial(_spill_buffer, config))
        dense = Snapshot(model) if self._keep else None
        yield model, is_same
        if dense is not None and not config.recovery.instance.trains and not _narrows(prepared):
            dense.restore()
            weights.follow(resolve(model), None)
            self._kept = (key, model)

    def probe(self, view: DecoderView, *, heads: bool, experts: bool = False, prunes: bool = True) -> None:
        """Probe the model of the pool, once for all its runs (:func:`cfsp.pruner.probe.probe`).

        Args:
            view: view of the model.
            heads: probe attention heads too.
            experts: probe experts too.
            prunes: whether the run prunes the model. A model that is only evaluated may have blocks of any form.
        """
        if not prunes and not self._tried:
            try_model(view)  # a later run of the pool may prune, so try_blocks is still due
        elif not self._tried:
            try_blocks(view)
            self._tried = True
        if (heads, experts) not in self._probed:
            probe(view, heads=heads, experts=experts)
            self._probed.add((heads, experts))


def _spill_buffer(config: RunConfig) -> SpillBuffer:
    """Return a buffer for hidden states that keeps a limited number of bytes in memory and the rest on disk.

    The limit is ``calibration.memory_gb``, or half of the memory that is free now.
    """
    section = config.calibration
    limit_gb = None if isinstance(section, SelfCalibration) else section.memory_gb
    free = available(torch.device("cpu"))
    limit = int(_SHARE_OF_MEMORY * free) if limit_gb is None else int(limit_gb * 1e9)
    return SpillBuffer(limit, Path(config.paths.cache_dir))


def _narrows(prepared: Prepared) -> bool:
    """Return whether rounding to the stored dtype, which is narrower than the one in memory, changes the weights."""
    narrower = torch.finfo(prepared.stored_dtype).bits < torch.finfo(prepared.dtype).bits
    return narrower and prepared.stored_dtype != getattr(torch, prepared.source.stored_dtype)
