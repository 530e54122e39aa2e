"""Training checkpoints that count only when they are whole: Trainer writes into its folder file by file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

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
