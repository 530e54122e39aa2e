"""Read the history of a model folder: the plan in it, where cfsp's marker states that it belongs to the weights.

Any program may have written a file of the name plan.json. It counts only if cfsp wrote ``cfsp_checkpoint.json`` with
it, the sha256 of plan and weights stand there (folders of earlier versions have none) and its sizes are those of the
weights. So a plan is no history even where it was exchanged together with its marker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError
from cfsp.plan.check import BlockSizes, size_mismatch
from cfsp.plan.pruning_plan import COMPENSATION_IN_FOLDER, PruningPlan
from cfsp.system.digest import file_digest
from cfsp.system.reading import read_bytes, read_json

log = logging.getLogger(__name__)

PLAN = "plan.json"
MARKER = "cfsp_checkpoint.json"
#: In the marker: sha256 of the plan.json that was saved with the weights, and of each weight file by its name.
PLAN_DIGEST, WEIGHT_DIGESTS = "plan_sha256", "weights_sha256"


def plan_digest(content: bytes) -> str:
    """Return the sha256 of a plan.json, as the marker states it."""
    return hashlib.sha256(content).hexdigest()


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Return the content of cfsp's marker in a folder; None for folders that cfsp did not write.

    Raises:
        CheckpointError: the file is not a marker that cfsp wrote.
    """
    file = folder / MARKER
    if not os.path.lexists(file):
        return None
    marker = read_json(file, str(file))
    problem = _marker_problem(marker)
    if problem is not None:
        raise CheckpointError(
            f"{file}: not a marker that cfsp wrote ({problem}); restore it, or remove it: the folder then counts as "
            "any model"
        )
    return marker


def is_written_by_cfsp(folder: Path) -> bool:
    """Return whether a folder has a marker that cfsp wrote; a damaged one, or a foreign file of its name, is none."""
    try:
        return read_marker(folder) is not None
    except CheckpointError:
        return False


def _marker_problem(marker: Any) -> str | None:
    """Return a clause on the first value of a marker that cfsp would not write; None for a good marker.

    A digest that is left out is that of an earlier version; one of another type would switch its check off.
    """
    if not isinstance(marker, dict):
        return f'expected a JSON object, e.g. {{"{PLAN_DIGEST}": "..."}}; it holds {_shorten_value(marker)}'
    if type(marker.get("schema")) is not int:
        return f"schema: expected a whole number; it is {_shorten_value(marker.get('schema'))}"
    for key, kind, expected in (
        ("state", str, "a text"),
        (PLAN_DIGEST, str, "a sha256"),
        (WEIGHT_DIGESTS, dict, "an object of file names and their sha256"),
    ):
        if key in marker and not isinstance(marker[key], kind):
            return f"{key}: expected {expected}; it is {_shorten_value(marker[key])}"
    return None


def _shorten_value(value: Any) -> str:
    return json.dumps(value)[:60]


def read_plan_history(
    folder: Path, sizes: Sequence[BlockSizes] | None = None, *, tensors: bool = True
) -> PruningPlan | None:
    """Return the plan by which the weights in ``folder`` came from a dense model; None where there is no such history.

    A plan.json without a marker is no history; the log says so once.

    Args:
        folder: a model folder.
        sizes: sizes of each block of the model in ``folder``, from :func:`cfsp.plan.check.read_block_sizes`; None:
            they were compared before.
        tensors: read the tensors that the plan replaces, too.

    Raises:
        CheckpointError: the marker is damaged, or names a plan that is damaged, exchanged, or not that of the weights.
    """
    marker = read_marker(folder)
    if not os.path.lexists(folder / PLAN):
        return None
    if marker is None:
        _log_ignored_plan(folder / PLAN)
        return None
    if sizes is not None:
        _check_weights(folder, marker.get(WEIGHT_DIGESTS))
    return _read_checked_plan(folder, marker.get(PLAN_DIGEST), sizes, tensors)


def check_history(folder: Path, sizes: Sequence[BlockSizes]) -> None:
    """Check the history of ``folder``, once for each state of its files.

    Raises:
        CheckpointError: the marker names a plan that is damaged, exchanged, or not that of the weights.
    """
    if not os.path.lexists(folder / PLAN):
        read_marker(folder)
        return
    files = (folder / PLAN, folder / MARKER, folder / COMPENSATION_IN_FOLDER, *sorted(folder.glob("*.safetensors")))
    _check_once(folder, tuple(sizes), tuple(_state(file) for file in files))


@lru_cache(maxsize=64)
def _check_once(folder: Path, sizes: tuple[BlockSizes, ...], _: tuple[Any, ...]) -> None:
    read_plan_history(folder, sizes)


def _state(file: Path) -> tuple[int, ...] | None:
    """Return numbers that change when a file does; None where it cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check_weights(folder: Path, digests: Any) -> None:
    """Compare the weight files with the digests in the marker; a process hashes each file once.

    Raises:
        CheckpointError: a weight file is another one than was saved with the marker.
    """
    if not isinstance(digests, dict):  # a folder of an earlier version
        return
    for name, digest in digests.items():
        file = folder / str(name)
        if Path(str(name)).name != name or not file.is_file() or file_digest(file) != digest:
            raise CheckpointError(
                f"{folder / PLAN}: not the plan of these weights ({str(name)[:100]} is not the file that {MARKER} "
                "names); restore the folder, or remove plan.json: the folder then counts as a model without a history"
            )


def _read_checked_plan(folder: Path, digest: Any, sizes: Sequence[BlockSizes] | None, tensors: bool) -> PruningPlan:
    file = folder / PLAN
    remedy = "restore it, or remove it: the folder then counts as a model without a history"
    if digest is not None and plan_digest(read_bytes(file, str(file))) != digest:
        raise CheckpointError(f"{file}: not the plan that was saved with these weights ({MARKER} differs); {remedy}")
    try:
        plan = PruningPlan.load(file, tensors=tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    problem = None if sizes is None else size_mismatch(plan, sizes)
    if problem is not None:
        raise CheckpointError(f"{file}: not the plan of these weights ({problem}); {remedy}")
    return plan


@lru_cache(maxsize=64)
def _log_ignored_plan(file: Path) -> None:
    log.warning("%s: ignored, it is no history of these weights (no %s beside it says so)", file, MARKER)
