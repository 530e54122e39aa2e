"""The calibration pass over a streamed model: block after block, kept on disk on the way against a kill."""

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

from cfsp.calibrate.collectors import collecting
from cfsp.calibrate.statistics import BlockStatistics, Statistics
from cfsp.models.driver import BlockDriver
from cfsp.models.hidden_states import HiddenStates
from cfsp.models.shard_writer import Outgoing, write_file
from cfsp.models.shards import Shards
from cfsp.models.views import BlockView

log = logging.getLogger(__name__)

#: What is kept on the way may take this share of the time.
_SHARE_OF_TIME = 0.1

Visit = Callable[[BlockView, BlockStatistics], None]


@dataclass(frozen=True)
class _Progress:
    """A folder ``<number of blocks done>/`` with their statistics and the hidden states leaving the last of them.

    The states are written and read batch by batch, like a checkpoint, so that they are not in memory once more.
    """

    folder: Path | None

    def read(self, hidden: HiddenStates, batches: int) -> list[BlockStatistics]:
        """What is there of a pass that was killed: statistics, and its states into ``hidden``; [] where nothing is."""
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
        except Exception as error:  # any damage: the pass begins anew
            log.warning("what a killed calibration left cannot be read (%s); beginning anew", error)
            hidden.clear()
            return []
        log.info("calibration goes on after block %d", done - 1)
        return list(statistics.blocks)

    def write(self, blocks: list[BlockStatistics], hidden: HiddenStates, shape: torch.Size) -> None:
        """Put the state of the pass in the place of the one before.

        Raises:
            OSError, SafetensorError: it cannot be written; the one before is still there.
        """
        if self.folder is None:
            return
        done, partial = self.folder / str(len(blocks)), self.folder / f".{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            Statistics(tuple(blocks), *shape).save(partial / "statistics.safetensors", {})
            (partial / "hidden").mkdir()
            described = [Outgoing(str(batch), *hidden.shape(batch)) for batch in range(len(hidden))]
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


def block_by_block(driver: BlockDriver, input_ids: Tensor, folder: Path | None, visit: Visit | None) -> Statistics:
    """Each block is read once and sees every sequence before the next one is.

    Args:
        input_ids: [n, T].
        folder: where the state of the pass is kept until it ends; None: nowhere.
        visit: called with each block while its weights are in memory, and its statistics.
    """
    progress = _Progress(folder)
    kept = driver.hidden_states()
    blocks = progress.read(kept, -(-len(input_ids) // driver.batch_size))
    last, cost, keeping = 0.0, 0.0, folder is not None
    for step in driver.steps(input_ids, "calibrate", hidden=kept if blocks else None, first=len(blocks)):
        with collecting([step.block]) as sums:
            hidden = step.advance()
        blocks.append(sums[0].report(*input_ids.shape))
        if visit is not None:
            visit(step.block, blocks[-1])
        if keeping and len(blocks) < len(driver.view.blocks) and time.perf_counter() - last > cost / _SHARE_OF_TIME:
            start = time.perf_counter()
            try:
                progress.write(blocks, hidden, input_ids.shape)
            except (OSError, SafetensorError) as error:  # the pass itself does not need it
                keeping = False
                log.warning("%s: the state of the calibration cannot be kept (%s); it goes on without", folder, error)
            last = time.perf_counter()
            cost = last - start
    progress.remove()
    return Statistics(tuple(blocks), *input_ids.shape)
