"""Checkpoints of a training and its trained weights, from which a killed run continues.

Trainer writes a checkpoint's folder file by file, so a killed process may leave an incomplete folder. A folder is
therefore used only if it is sealed. The seal is a file that is written last, after all others are on the disk, and it
lists their sizes.
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
    """Mark ``folder`` as complete, and store ``content`` for :func:`read_seal`."""
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
    """Return the content of the folder's seal; None if the folder is incomplete or belongs to another run."""
    try:
        content = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        is_complete = all((folder / name).stat().st_size == size for name, size in content["files"].items())
        return content if is_complete and content["run_id"] == run_id else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def find_last_checkpoint(folder: Path, run_id: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest complete checkpoint of this run and the content of its seal; None if there is none.

    Incomplete checkpoints and those of another run are removed.
    """
    complete: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in folder.glob("checkpoint-*"):
        content = read_seal(path, run_id)
        if content is None:
            shutil.rmtree(path)
        else:
            complete[int(content["step"])] = path, content
    return complete[max(complete)] if complete else None


def seal_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Seal a checkpoint, and then remove the older ones."""
    seal(path, content)
    for other in path.parent.glob("checkpoint-*"):
        if other != path:
            shutil.rmtree(other)


def save_trained(model: nn.Module, folder: Path, run_id: str, record: dict[str, Any]) -> None:
    """Save the trained parameters of ``model``, and the facts for the record."""
    from safetensors.torch import save_file

    trained_folder = folder / "trained"
    shutil.rmtree(trained_folder, ignore_errors=True)
    trained_folder.mkdir(parents=True)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with replacing(trained_folder / "weights.safetensors") as partial:
        save_file(trained, partial)
    seal(trained_folder, {"run_id": run_id, "record": record})


def load_trained(model: nn.Module, folder: Path, run_id: str) -> dict[str, Any] | None:
    """Load the weights of :func:`save_trained` into ``model``.

    Returns:
        Facts for the record; None if this run has saved no trained weights.
    """
    from safetensors.torch import load_file

    content = read_seal(folder / "trained", run_id)
    if content is None:
        return None
    model.load_state_dict(load_file(folder / "trained" / "weights.safetensors"), strict=False)
    return content["record"]
