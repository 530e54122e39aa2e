"""The calibration pass over a streamed model, block by block; its state on disk lets a killed run resume."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cfsp.architecture.views import BlockView
from cfsp.calibration.collectors import collecting
from cfsp.calibration.gram import gram_sums
from cfsp.calibration.gram_store import GramCollection
from cfsp.calibration.statistics import BlockStatistics, Statistics
from cfsp.model.driver import BlockDriver
from cfsp.model.hidden_states import HiddenStates
from cfsp.weights.shard_writer import TensorSpec, write_file
from cfsp.weights.shards import Shards

log = logging.getLogger(__name__)

#: Share of the time that keeping the state of the pass may take.
_SHARE_OF_TIME = 0.1

Visit = Callable[[BlockView, BlockStatistics], None]


@dataclass(frozen=True)
class _Progress:
    """The state of a pass: a folder ``<number of blocks done>/`` with statistics and the last hidden states.

    The states are written and read batch by batch, like a checkpoint, so that memory never holds a second copy.
    """

    folder: Path | None

    def read(self, hidden: HiddenStates, batches: int) -> list[BlockStatistics]:
        """Read the state of a pass that was killed; its hidden states are appended to ``hidden``.

        Returns:
            The statistics of the finished blocks; [] where there is no state.
        """
        if self.folder is None or not self.folder.is_dir():
            return []
        done = max((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), default=0)
        if not done:
            return []
        try:
            statistics = Statistics.load(self.folder / str(done) / "statistics.safetensors")
            states = Shards(self.folder / str(done) / "hidden")
            for batch in range(batches):
                hidden.append(states.read(str(batch)))
        except Exception as error:  # Whatever the damage: the pass starts again.
            log.warning("what a killed calibration left cannot be read (%s); beginning anew", error)
            hidden.clear()
            return []
        log.info("calibration goes on after block %d", done - 1)
        return list(statistics.blocks)

    def write(self, blocks: list[BlockStatistics], hidden: HiddenStates, shape: torch.Size) -> None:
        """Replace the state of the pass.

        Raises:
            OSError, SafetensorError: the state cannot be written; the earlier state remains.
        """
        if self.folder is None:
            return
        done, partial = self.folder / str(len(blocks)), self.folder / f".{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            Statistics(tuple(blocks), *shape).save(partial / "statistics.safetensors", {})
            (partial / "hidden").mkdir()
            described = [TensorSpec(str(batch), *hidden.shape(batch)) for batch in range(len(hidden))]
            states = ((str(batch), state) for batch, state in enumerate(hidden))
            write_file(partial / "hidden" / "states.safetensors", described, states)
            shutil.rmtree(done, ignore_errors=True)
            partial.rename(done)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for path in self.folder.iterdir():
            if path != done:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def block_by_block(
    driver: BlockDriver,
    input_ids: Tensor,
    folder: Path | None,
    visit: Visit | None,
    grams: GramCollection | None = None,
) -> Statistics:
    """Run every sequence through one block before the next block starts, so that each block is read once.

    Args:
        input_ids: [n, T].
        folder: where the state of the pass is kept until it ends; None: nowhere.
        visit: called with each block while its weights are in memory, and its statistics.
        grams: matrices to be collected on the way.
    """
    progress = _Progress(folder)
    kept = driver.hidden_states()
    blocks = progress.read(kept, -(-len(input_ids) // driver.batch_size))
    last, cost, keeping = 0.0, 0.0, folder is not None
    for step in driver.steps(input_ids, "calibrate", hidden=kept if blocks else None, first=len(blocks)):
        with (
            collecting([step.block]) as sums,
            gram_sums([step.block], None if grams is None else grams.request) as matrices,
        ):
            hidden = step.advance()
        if grams is not None:
            grams.keep(matrices, first=step.block.index)
        blocks.append(sums[0].report(*input_ids.shape))
        if visit is not None:
            visit(step.block, blocks[-1])
        if keeping and len(blocks) < len(driver.view.blocks) and time.perf_counter() - last > cost / _SHARE_OF_TIME:
            start = time.perf_counter()
            try:
                progress.write(blocks, hidden, input_ids.shape)
            except (OSError, SafetensorError) as error:  # The pass itself does not need the saved state.
                keeping = False
                log.warning("%s: the state of the calibration cannot be kept (%s); it goes on without", folder, error)
            last = time.perf_counter()
            cost = last - start
    progress.remove()
    return Statistics(tuple(blocks), *input_ids.shape)
