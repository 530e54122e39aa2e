"""The processes of ``accelerate launch`` or ``torchrun``: the first runs every stage, the others join it to train.

Each function is called by all processes at the same point and does nothing where there is but one. What is said here
goes over a gloo group of its own, so that the others can wait for hours without a deadline and without a busy GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

#: The others wait as long as the first takes for what comes before the training.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Launched:
    """This process among ``count``; ``local_rank`` counts within its machine."""

    rank: int
    count: int
    local_rank: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1


def launched() -> Launched:
    """What the launcher says of this process; one process alone where nothing launched it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count <= 1:
        return Launched(0, 1, 0)
    return Launched(int(os.environ.get("RANK", "0")), count, int(os.environ.get("LOCAL_RANK", "0")))


_group: Any = None


def connect() -> None:
    """Meet the others."""
    global _group
    if _group is not None or not launched().several:
        return
    import torch
    from torch import distributed

    # Each process loads the model and applies the plan; accelerate would load it on the first alone.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _group = distributed.new_group(backend="gloo", timeout=_PATIENCE)


def connected() -> bool:
    """Whether this process has met others and can still reach them."""
    return _group is not None


def disconnect() -> None:
    """Part from the others, at the end of the program."""
    global _group
    if _group is None:
        return
    from torch import distributed

    _group = None
    distributed.destroy_process_group()


def shared(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, in all of them; it runs there alone."""
    if _group is None:
        return make()
    from torch import distributed

    values = [make() if launched().first else None]
    distributed.broadcast_object_list(values, src=0, group=_group)
    return values[0]  # type: ignore[return-value]


def total(value: int) -> int:
    """The sum over all processes."""
    if _group is None:
        return value
    import torch
    from torch import distributed

    number = torch.tensor([value], dtype=torch.int64)
    distributed.all_reduce(number, group=_group)
    return int(number)


def wait() -> None:
    """Until all are here."""
    if _group is not None:
        from torch import distributed

        distributed.barrier(group=_group)


@contextmanager
def together() -> Iterator[None]:
    """Work that all do at the same time. Who fails in it lets go of the others, who may be anywhere: the launcher
    ends them."""
    global _group
    wait()
    try:
        yield
    except BaseException:
        _group = None
        raise
    wait()
