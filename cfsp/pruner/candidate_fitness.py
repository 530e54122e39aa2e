"""Measuring the candidates of a search: blocks are cut and compensated in the loaded model, then restored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.config.components import option_of
from cfsp.config.contracts import Fitness
from cfsp.errors import ConfigError, DataError
from cfsp.model.driver import run_block
from cfsp.pruner.candidate_cuts import Cut, CutSubmodules
from cfsp.pruner.fitness_measures import NLL, KLToDense, Measure
from cfsp.pruner.search import KnownLosses
from cfsp.system.memory import available

if TYPE_CHECKING:
    from cfsp.allocator.search_space import Counts, SearchSpace
    from cfsp.architecture.views import BlockView
    from cfsp.config.contracts import SearchingAllocator
    from cfsp.model.hidden_states import HiddenStates
    from cfsp.pruner.base import PlanContext
    from cfsp.sparsity.budget import SubmoduleKind

#: Kept units of one block by the kind of the submodules that lose units.
Kept = dict["SubmoduleKind", int]
#: Function that runs a block with these units on one batch: block, units, number of the batch, states -> states.
RunBlock = Callable[["BlockView", Kept, int, Tensor], Tensor]

#: Share of the free memory of the CPU that hidden states of the best candidate may take.
_SHARE_OF_MEMORY = 0.25


class CandidateFitness(Fitness):
    """Fitness of candidates on calibration windows.

    A candidate mostly differs from the best one so far in few blocks. The hidden states of the best one are held, and
    the model runs from the first block that differs. To be used inside ``with restored(model)``: the blocks are
    changed.

    Attributes:
        n_parts: see :class:`cfsp.config.contracts.Fitness`.
        block_runs: how often a block ran on one window.
    """

    def __init__(
        self, context: PlanContext, space: SearchSpace, search: SearchingAllocator, cut: Cut, key: dict[str, Any]
    ) -> None:
        """Prepare the measurement.

        Args:
            context: the planning context.
            space: the slots of the candidates.
            search: the allocator, which states parts and measure.
            cut: decides on one submodule with a given number of units.
            key: everything beside candidate, windows and measure that decides the fitness; part of the key on disk.

        Raises:
            ConfigError: the model is streamed.
            DataError: windows of one token.
        """
        option, ids = option_of("allocator", search), context.calibration.input_ids
        if context.driver.view.weights.is_streamed:
            raise ConfigError(
                f"{option} runs the model for each candidate, which model.streaming=on would read each time; "
                "use allocator=coarse or reconstruction, or model.streaming=off"
            )
        if ids.shape[1] < 2:
            raise DataError(f"windows of one token have no next token to predict; {option} needs at least 2")
        self._driver, self._space = context.driver, space
        sizes = search.part_sizes(*ids.shape)
        self.n_parts, self.block_runs = len(sizes), 0
        ends = list(accumulate(sizes))
        batches = [
            list(ids[end - size : end].split(context.driver.batch_size)) for size, end in zip(sizes, ends, strict=True)
        ]
        #: Numbers of the batches of each part.
        self._batches = [
            range(last - len(part), last) for part, last in zip(batches, accumulate(map(len, batches)), strict=True)
        ]
        self._entry = self._driver.entry([batch for part in batches for batch in part])
        kinds = list(dict.fromkeys(space.kinds))
        view = context.driver.view
        self._cuts = CutSubmodules(view.blocks, kinds, cut, view.device)
        self._measure: Measure = NLL()
        measure: dict[str, Any] = {}
        if search.measure == "kl":
            self._measure = KLToDense(search.kl_entries, self._dense_logits)
            measure = {"measure": "kl", "entries": search.kl_entries}
        self._known = KnownLosses.of(context, ids[: ends[-1]], key | measure)
        room = int(_SHARE_OF_MEMORY * available(torch.device("cpu")))
        self._prefix = _Prefix(self._entry.hidden, view.blocks, self._run, room)
        self._lowest = math.inf

    @torch.no_grad()
    def __call__(self, counts: Counts, parts: Sequence[int] | None = None) -> float:
        """See :class:`cfsp.config.contracts.Fitness`. Every part is measured once for a candidate."""
        chosen = range(self.n_parts) if parts is None else parts
        sums = [(self._part(counts, part), self._tokens(part)) for part in chosen]
        value = sum(mean * tokens for mean, tokens in sums) / sum(tokens for _, tokens in sums)
        if parts is None and value < self._lowest:
            self._lowest = value
            self._prefix.follow(self._by_block(counts))
        return value

    def _tokens(self, part: int) -> int:
        return sum(self._measure.n_tokens(self._entry.ids[batch]) for batch in self._batches[part])

    def _part(self, counts: Counts, part: int) -> float:
        """Return the mean of one part; infinity where it is not finite."""
        names = {"ffn": "width", "attention": "groups"}
        slots = zip(self._space.blocks, self._space.kinds, counts, strict=True)
        key = [(block, f"{names[kind]}{count}") for block, kind, count in slots]
        key += [(-1, f"part{part}")] if self.n_parts > 1 else []
        mean = self._known.get(key)
        if mean is None:
            start = time.perf_counter()
            mean = self._measured(self._by_block(counts), part)
            self._known.put(key, mean, time.perf_counter() - start)
        return mean

    def _by_block(self, counts: Counts) -> list[Kept]:
        """Return the kept units of each block's submodules; those that lose nothing are left out."""
        kept: list[Kept] = [{} for _ in self._driver.view.blocks]
        for block, kind, count, row in zip(
            self._space.blocks, self._space.kinds, counts, self._space.legal, strict=True
        ):
            if count < row[-1]:
                kept[block][kind] = count
        return kept

    def _measured(self, kept: list[Kept], part: int) -> float:
        total = 0.0
        for batch in self._batches[part]:
            first, hidden = self._prefix.entering(batch, kept)
            for block in self._driver.view.blocks[first:]:
                hidden = self._run(block, kept[block.index], batch, hidden)
            ids = self._entry.ids[batch]
            total += self._measure.total(batch, self._driver.logits(ids, hidden), ids)
        return total / self._tokens(part) if math.isfinite(total) else math.inf

    def _run(self, block: BlockView, kept: Kept, batch: int, hidden: Tensor) -> Tensor:
        """Run one block with these numbers of units on one batch [B, T, d]."""
        self.block_runs += len(hidden)
        with self._cuts.installed(block, kept):
            return run_block(block, hidden.to(self._driver.view.device), self._entry.kwargs[block.index][batch])

    def _dense_logits(self, batch: int) -> Tensor:
        hidden = self._entry.hidden[batch]
        for block in self._driver.view.blocks:
            hidden = self._run(block, {}, batch, hidden)
        return self._driver.logits(self._entry.ids[batch], hidden)


class _Prefix:
    """Hidden states of one candidate, computed block by block as far as others share its blocks.

    Args:
        entering: hidden states that enter the first block, for each batch.
        blocks: blocks of the model.
        run: runs a block with given numbers of units on one batch.
        room: most bytes of hidden states to hold.
    """

    def __init__(self, entering: HiddenStates, blocks: Sequence[BlockView], run: RunBlock, room: int) -> None:
        self._entering, self._blocks, self._run, self._room = entering, blocks, run, room
        self._kept: list[Kept] | None = None
        #: Batch -> states that enter block 0, 1, 2, ... on CPU.
        self._states: dict[int, list[Tensor]] = {}
        self._bytes = 0

    def follow(self, kept: list[Kept]) -> None:
        """Hold the states of another candidate from now on; those before the first block that differs stay."""
        same = 0 if self._kept is None else _n_equal(self._kept, kept)
        for states in self._states.values():
            self._bytes -= sum(state.nbytes for state in states[same + 1 :])
            del states[same + 1 :]
        self._kept = kept

    def entering(self, batch: int, kept: list[Kept]) -> tuple[int, Tensor]:
        """Return the first block that has to run for a candidate, and the states that enter it."""
        same = 0 if self._kept is None else _n_equal(self._kept, kept)
        states = self._states.setdefault(batch, [])
        if not states:
            states.append(self._entering[batch].cpu())
        while self._kept is not None and len(states) <= same < len(kept):
            if self._bytes + states[-1].nbytes > self._room:
                break
            block = self._blocks[len(states) - 1]
            states.append(self._run(block, self._kept[block.index], batch, states[-1]).cpu())
            self._bytes += states[-1].nbytes
        reached = min(same, len(states) - 1)
        return reached, states[reached]


def _n_equal(one: list[Kept], other: list[Kept]) -> int:
    """Return the number of blocks at the beginning that two candidates have in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
