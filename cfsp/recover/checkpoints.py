"""What a training leaves on its way, so that a killed run goes on: checkpoints, and in the end the trained weights.

Trainer writes into a checkpoint's folder file by file: it counts only when it is marked as whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

#: Written into a checkpoint when it is whole; a checkpoint without it was cut off and is not resumed from.
_MARKER = "cfsp_complete.json"


def last_whole(folder: Path, run_id: str) -> Path | None:
    """The newest whole checkpoint of this run; what was cut off, or is another run's, is removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        try:
            marker = json.loads((path / _MARKER).read_text(encoding="utf-8"))
            if marker["run_id"] != run_id:
                raise ValueError(marker["run_id"])
            found[int(marker["step"])] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return found[max(found)] if found else None


def mark_whole(path: Path, content: dict[str, Any]) -> None:
    """Say that ``path`` is whole; only then are older checkpoints removed."""
    partial = path / f".{_MARKER}"
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path / _MARKER)
    for other in path.parent.glob("checkpoint-*"):
        if other != path:
            shutil.rmtree(other)


def read_marker(path: Path) -> dict[str, Any]:
    """What :func:`mark_whole` said of a whole checkpoint."""
    return json.loads((path / _MARKER).read_text(encoding="utf-8"))


def save_trained(model: nn.Module, folder: Path, run_id: str, record: dict[str, Any]) -> None:
    """Keep what was trained of ``model``, and what the record says of it: all or nothing."""
    from safetensors.torch import save_file

    partial, whole = folder / f"trained.{os.getpid()}.partial", folder / "trained"
    partial.mkdir()
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, partial / "weights.safetensors")
    (partial / "record.json").write_text(json.dumps({"run_id": run_id, "record": record}), encoding="utf-8")
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(partial, whole)


def load_trained(model: nn.Module, folder: Path, run_id: str) -> dict[str, Any] | None:
    """Put the weights of :func:`save_trained` into ``model``; returns the record, None where this run left none."""
    from safetensors.torch import load_file

    try:
        found = json.loads((folder / "trained" / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if found["run_id"] != run_id:
        return None
    model.load_state_dict(load_file(folder / "trained" / "weights.safetensors"), strict=False)
    return found["record"]
