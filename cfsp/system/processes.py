"""Communication between the processes of ``accelerate launch`` or ``torchrun``.

The first process runs every stage, and the others join it for training.

All processes call each function at the same point; with a single process the functions do nothing. Messages go through
a separate gloo group, so that the others can wait for hours without a deadline and without a busy GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

#: Longest wait of the other processes for the stages that the first one runs before training.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Launched:
    """Rank of this process among the launched ones.

    Attributes:
        rank: index of this process, from 0.
        count: number of processes.
        local_rank: index of this process on its machine, from 0.
    """

    rank: int
    count: int
    local_rank: int

    @property
    def first(self) -> bool:
        """True in the process that runs every stage."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """True if there is more than one process."""
        return self.count > 1


def launched() -> Launched:
    """Return the rank of this process among the launched ones; a single process if no launcher started it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count <= 1:
        return Launched(0, 1, 0)
    return Launched(int(os.environ.get("RANK", "0")), count, int(os.environ.get("LOCAL_RANK", "0")))


_group: Any = None


def connect() -> None:
    """Connect to the other processes."""
    global _group
    if _group is not None or not launched().several:
        return
    import torch
    from torch import distributed

    # Each process loads the model and applies the plan; accelerate would load it only on the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _group = distributed.new_group(backend="gloo", timeout=_PATIENCE)


def connected() -> bool:
    """Return whether this process is connected to others."""
    return _group is not None


def disconnect() -> None:
    """Disconnect from the other processes, at the end of the program."""
    global _group
    if _group is None:
        return
    from torch import distributed

    _group = None
    distributed.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """Call ``make`` in the first process alone, and return its result in all processes."""
    if _group is None:
        return make()
    from torch import distributed

    values = [make() if launched().first else None]
    distributed.broadcast_object_list(values, src=0, group=_group)
    return values[0]  # type: ignore[return-value]


def total(value: int) -> int:
    """Return the sum of ``value`` over all processes."""
    if _group is None:
        return value
    import torch
    from torch import distributed

    number = torch.tensor([value], dtype=torch.int64)
    distributed.all_reduce(number, group=_group)
    return int(number)


def wait() -> None:
    """Wait until all processes have reached this point."""
    if _group is not None:
        from torch import distributed

        distributed.barrier(group=_group)


@contextmanager
def together() -> Iterator[None]:
    """Start and end the work inside the context in all processes at the same time.

    A process that fails inside does not wait for the others, because the launcher then ends them.
    """
    global _group
    wait()
    try:
        yield
    except BaseException:
        _group = None
        raise
    wait()
