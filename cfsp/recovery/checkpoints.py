"""Checkpoints of a training, and in the end its trained weights, so that a killed run goes on.

Trainer writes into a checkpoint's folder file by file, so a folder counts only once it is sealed: every file is on the
disk, and their sizes stand in the seal, which is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.system.atomic import replacing

if TYPE_CHECKING:
    from torch import nn

_SEAL = "cfsp_complete.json"


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Mark ``folder`` as whole, with ``content`` for :func:`read_seal`."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files.pop(_SEAL, None)
    for path in files.values():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sizes = {name: path.stat().st_size for name, path in files.items()}
    with replacing(folder / _SEAL) as partial, partial.open("w", encoding="utf-8") as stream:
        json.dump(content | {"files": sizes}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def read_seal(folder: Path, run_id: str) -> dict[str, Any] | None:
    """Return the content that this run sealed into ``folder``; None where it is not whole, or another run's."""
    try:
        content = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        is_complete = all((folder / name).stat().st_size == size for name, size in content["files"].items())
        return content if is_complete and content["run_id"] == run_id else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def last_whole(folder: Path, run_id: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint of this run with the content of its seal; others are removed."""
    complete: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in folder.glob("checkpoint-*"):
        content = read_seal(path, run_id)
        if content is None:
            shutil.rmtree(path)
        else:
            complete[int(content["step"])] = path, content
    return complete[max(complete)] if complete else None


def seal_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Seal a checkpoint; only then are older ones removed."""
    seal(path, content)
    for other in path.parent.glob("checkpoint-*"):
        if other != path:
            shutil.rmtree(other)


def save_trained(model: nn.Module, folder: Path, run_id: str, record: dict[str, Any]) -> None:
    """Keep what was trained of ``model``, and what the record says of it."""
    from safetensors.torch import save_file

    place = folder / "trained"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with replacing(place / "weights.safetensors") as partial:
        save_file(trained, partial)
    seal(place, {"run_id": run_id, "record": record})


def load_trained(model: nn.Module, folder: Path, run_id: str) -> dict[str, Any] | None:
    """Put the weights of :func:`save_trained` into ``model``; returns the record, None where this run left none."""
    from safetensors.torch import load_file

    content = read_seal(folder / "trained", run_id)
    if content is None:
        return None
    model.load_state_dict(load_file(folder / "trained" / "weights.safetensors"), strict=False)
    return content["record"]
