"""The model that several runs of one process start from: loaded once, given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.architecture.views import resolve
from cfsp.config.sections import SelfCalibration
from cfsp.model.hidden_states import SpillBuffer
from cfsp.model.load import load_model, load_streamed
from cfsp.model.snapshot import Snapshot
from cfsp.model.streamed import streamed
from cfsp.model.trial import try_blocks
from cfsp.pruner.probe import probe
from cfsp.system.memory import available

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.config.run_config import RunConfig
    from cfsp.pipeline.preflight import Prepared


#: Of the free memory, for the hidden states of a streamed model.
_SHARE_OF_MEMORY = 0.5


class BaseModels:
    """Lends the base model of a run; ``keep``: the last one stays in memory for the next run of the same model."""

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._kept: tuple[Any, Any] | None = None
        self._probed: set[tuple[bool, bool]] = set()
        self._tried = False

    @property
    def held(self) -> int:
        """Bytes of the weights that are kept in memory."""
        if self._kept is None:
            return 0
        return sum(p.numel() * p.element_size() for p in self._kept[1].parameters() if not p.is_meta)

    @contextmanager
    def lent(self, prepared: Prepared) -> Iterator[tuple[Any, bool]]:
        """(the model, was it here?). Slicing swaps modules and parameters, which a snapshot undoes.

        Where values are written into shared parameters (a recovery; rounding to a narrower dtype), or the run failed,
        the model is not kept.
        """
        config = prepared.config
        key = (
            prepared.source.fingerprint,
            prepared.dtype,
            prepared.device,
            prepared.streaming,
            config.model.trust_remote_code,
        )
        found, self._kept = self._kept, None  # never two base models at a time
        here = found is not None and found[0] == key
        model: Any = found[1] if found is not None and here else None
        del found
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
        store = streamed(model)
        if store is not None:
            store.spill = _spill_buffer(config)
        as_it_was = Snapshot(model) if self._keep else None
        yield model, here
        if as_it_was is not None and not config.recovery.instance.trains and not _narrows(prepared):
            as_it_was.restore()
            if store is not None:
                store.follow(resolve(model), None)
            self._kept = (key, model)

    def probe(self, view: DecoderView, *, heads: bool, experts: bool = False, prunes: bool = True) -> None:
        """Probe the view of the lent model, once for all its runs (:func:`cfsp.pruner.probe.probe`).

        Args:
            prunes: the run prunes the model; one that is evaluated alone may have blocks of any form.
        """
        if prunes and not self._tried:
            try_blocks(view)
            self._tried = True
        if (heads, experts) not in self._probed:
            probe(view, heads=heads, experts=experts)
            self._probed.add((heads, experts))


def _spill_buffer(config: RunConfig) -> SpillBuffer:
    """In memory: what ``calibration.memory_gb`` says, or half of what is free now."""
    section = config.calibration
    asked = None if isinstance(section, SelfCalibration) else section.memory_gb
    free = available(torch.device("cpu"))
    limit = int(_SHARE_OF_MEMORY * free) if asked is None else int(asked * 1e9)
    return SpillBuffer(limit, Path(config.paths.cache_dir))


def _narrows(prepared: Prepared) -> bool:
    """Whether rounding to the stored dtype changes weights: narrower than the dtype in memory, and not their own."""
    narrower = torch.finfo(prepared.stored_dtype).bits < torch.finfo(prepared.dtype).bits
    return narrower and prepared.stored_dtype != getattr(torch, prepared.source.stored_dtype)
