"""Greedy search for the submodules whose removal raises the loss least, without rebuilding the model.

A removed submodule is nulled by shadowing its forward, so that nothing of it is computed. A candidate in block b runs
from block b on, on the cached hidden states of the unchanged prefix. Every measured loss is kept on disk.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.architecture.experts import ExpertsFFN
from cfsp.architecture.views import BlockView
from cfsp.errors import DataError, RunError
from cfsp.model.block_calls import replace_forward
from cfsp.model.driver import BlockDriver, Entry, run_block
from cfsp.model.nll import total_nll
from cfsp.pruner.submodules import check_can_be_skipped, parts
from cfsp.system.atomic import write_text
from cfsp.system.cache import note_saved
from cfsp.system.progress import progress

if TYPE_CHECKING:
    from cfsp.pruner.base import PlanContext

log = logging.getLogger(__name__)

#: Part of the key of kept losses: raise it whenever how they are measured changes.
SEARCH_VERSION = 2

#: A submodule: block index and "attention" or "ffn".
Candidate = tuple[int, str]


class KnownLosses:
    """Measured losses by the removed submodules, with the seconds that each took; on disk, or in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.values: dict[str, tuple[float, float]] = {}
        self._own: set[str] = set()  # measured here, or counted as saved
        if path is not None and path.is_file():
            try:
                kept = json.loads(path.read_text()).items()
                self.values = {str(key): (float(loss), float(seconds)) for key, (loss, seconds) in kept}
                if any(math.isnan(number) for pair in self.values.values() for number in pair):
                    raise ValueError("a loss is no number")
            except Exception as error:  # Whatever the damage: the losses can be measured again.
                self.values = {}
                log.warning("kept losses %s cannot be read (%s); measuring them again", path.name, error)

    @staticmethod
    def of(context: PlanContext, input_ids: Tensor, before: Mapping[str, Any]) -> KnownLosses:
        """Read the losses of this model that are kept on disk.

        Args:
            input_ids: ids that the losses are measured on, [n, T].
            before: all changes made to the model before the search, as part of the key.
        """
        if context.cache is None:
            return KnownLosses()
        key = {
            "model": context.cache.model_fingerprint,
            "ids": hashlib.sha256(input_ids.cpu().contiguous().numpy().tobytes()).hexdigest(),
            "shape": list(input_ids.shape),
            "dtype": str(context.driver.view.model.dtype),
            "batch_size": context.driver.batch_size,
            "before": before,
            "version": SEARCH_VERSION,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return KnownLosses(context.cache.folder / "search" / f"{digest[:32]}.json")

    def get(self, removed: Sequence[Candidate]) -> float | None:
        """Return the loss if this search or an earlier one has measured it, otherwise None."""
        kept = self.values.get(self._key(removed))
        if kept is None:
            return None
        if self._key(removed) not in self._own:
            note_saved(kept[1])
            self._own.add(self._key(removed))
        return kept[0]

    def put(self, removed: Sequence[Candidate], loss: float, seconds: float) -> None:
        """Keep a loss and write it to disk immediately, so that a killed search can resume."""
        self.values[self._key(removed)] = (loss, seconds)
        self._own.add(self._key(removed))
        if self.path is not None:
            write_text(self.path, json.dumps(self.values))

    @staticmethod
    def _key(removed: Sequence[Candidate]) -> str:
        return " ".join(f"{block}.{kind}" for block, kind in sorted(removed))


class SubmoduleSearch:
    """Greedy removal by loss on ids [n, T]. Inside ``with``, the submodules removed so far are nulled.

    Attributes:
        history: removed submodules, in order, each with the loss of the model without it.
        block_runs: how often a block ran on all ids.

    Raises:
        DataError: windows of one token.
    """

    def __init__(self, driver: BlockDriver, input_ids: Tensor, known: KnownLosses) -> None:
        if input_ids.shape[1] < 2:
            raise DataError("windows of one token have no next token to predict; a search needs at least 2")
        self.driver, self.input_ids, self.known = driver, input_ids, known
        self.removed: list[Candidate] = []
        self.history: list[dict[str, Any]] = []
        self.block_runs = 0
        self._entry: Entry | None = None
        #: Hidden states entering each block reached so far; behind the last block, those leaving it.
        self._states: list[list[Tensor]] = []
        self._nulled = ExitStack()

    def __enter__(self) -> SubmoduleSearch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._nulled.close()

    def greedy(self, allowed: Callable[[Sequence[Candidate]], Sequence[Candidate]]) -> None:
        """Remove the candidate with the lowest loss repeatedly, until no candidate remains.

        Of equal losses the lower block goes first, then the attention.

        Args:
            allowed: returns the candidates for the next removal, from the submodules removed so far.

        Raises:
            RunError: no candidate's loss is finite.
        """
        while candidates := sorted(allowed(self.removed)):
            losses = {}
            for candidate in progress(candidates, f"search, removal {len(self.removed) + 1}", unit="candidate"):
                losses[candidate] = self.loss(candidate)
            best = min(candidates, key=lambda candidate: losses[candidate])
            if not math.isfinite(losses[best]):
                raise RunError("the loss is not finite whatever is removed; try model.dtype=float32")
            self.remove(best)
            self.history.append({"block": best[0], "kind": best[1], "nll": losses[best]})
        log.info("search: %d removed, blocks run %d times on all sequences", len(self.removed), self.block_runs)

    @torch.no_grad()
    def loss(self, candidate: Candidate) -> float:
        """Measure the loss without the removed submodules and ``candidate``.

        Returns:
            Mean NLL, nats per predicted token; infinity where it is not finite.
        """
        kept = self.known.get([*self.removed, candidate])
        if kept is None:
            start = time.perf_counter()
            with nulled(self.driver.view.blocks[candidate[0]], candidate[1]):
                kept = self._loss_from(candidate[0])
            self.known.put([*self.removed, candidate], kept, time.perf_counter() - start)
        return kept

    def remove(self, candidate: Candidate) -> None:
        """Null ``candidate`` for the rest of the search, and drop the cached hidden states behind it."""
        self._nulled.enter_context(nulled(self.driver.view.blocks[candidate[0]], candidate[1]))
        self.removed.append(candidate)
        del self._states[candidate[0] + 1 :]

    def _loss_from(self, first: int) -> float:
        entry = self._reach(first)
        device = self.driver.view.device
        total, count = 0.0, 0
        for batch, ids in enumerate(entry.ids):
            hidden = self._states[first][batch].to(device)
            for block in self.driver.view.blocks[first:]:
                hidden = run_block(block, hidden, entry.kwargs[block.index][batch])
            total += total_nll(self.driver.logits(ids, hidden), ids)
            count += ids[:, 1:].numel()
        self.block_runs += len(self.driver.view.blocks) - first
        return total / count if math.isfinite(total) else math.inf

    def _reach(self, block: int) -> Entry:
        """Compute the states entering ``block``, starting from the last cached ones."""
        if self._entry is None:
            self._entry = self.driver.entry(self.input_ids)
        if not self._states:
            self._states.append([hidden.cpu() for hidden in self._entry.hidden])
        device = self.driver.view.device
        while len(self._states) <= block:
            view = self.driver.view.blocks[len(self._states) - 1]
            self._states.append(
                [
                    run_block(view, hidden.to(device), kwargs).cpu()
                    for hidden, kwargs in zip(self._states[-1], self._entry.kwargs[view.index], strict=True)
                ]
            )
            self.block_runs += 1
        return self._entry


@contextmanager
def nulled(block: BlockView, kind: str) -> Iterator[None]:
    """Skip the attention or FFN of ``block`` inside ``with``, so that it adds nothing to the residual stream."""
    part = block.attention if kind == "attention" else block.ffn
    width: int | None = None
    if part is None or isinstance(part, ExpertsFFN):  # an attention without KV groups, or a mixture
        if kind == "ffn":
            check_can_be_skipped(block)
        module = getattr(block.module, parts(block, "attention" if kind == "attention" else "mlp")[0])
    else:
        module, width = part.module, part.output.out_features
        if module is block.module:  # an FFN without a module of its own
            module = part.output.module
    adds_residual = "residual" in inspect.signature(type(module).forward).parameters

    def nothing(*args: Any, **kwargs: Any) -> Any:
        if adds_residual:
            zeros = kwargs["residual"] if "residual" in kwargs else args[1]
        else:
            hidden = args[0] if args else kwargs["hidden_states"]
            zeros = hidden.new_zeros(*hidden.shape[:-1], hidden.shape[-1] if width is None else width)
        return (zeros, None) if kind == "attention" else zeros

    with replace_forward(module, nothing):
        yield
