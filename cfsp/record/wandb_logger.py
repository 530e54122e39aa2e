"""Weights & Biases as a mirror of the record: online where a key is there, else an offline run on disk."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from cfsp.components import component

log = logging.getLogger(__name__)


@component
class WandbLogger:
    """One W&B run per run of cfsp; a process with several runs finishes each before the next starts."""

    project: str = "cfsp"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline"] = "auto"

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        import wandb

        mode = self._mode()
        # A repeated run replaces what its earlier attempt left here: one W&B run per run.
        for earlier in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(earlier)
        wandb.init(
            project=self.project, entity=self.entity, group=self.group, tags=list(self.tags), id=run_id, name=run_id,
            dir=str(folder), config=configuration, mode=mode, reinit="finish_previous",
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )  # fmt: skip

    def log(self, values: dict[str, Any]) -> None:
        import wandb

        wandb.log(values)

    def image(self, name: str, path: Path) -> None:
        import wandb

        wandb.log({name: wandb.Image(str(path))})

    def finish(self, *, success: bool) -> None:
        import wandb

        wandb.finish(exit_code=0 if success else 1)

    def _mode(self) -> Literal["online", "offline", "disabled"]:
        if self.mode != "auto":
            return self.mode
        asked = os.environ.get("WANDB_MODE")
        if asked in ("online", "offline", "disabled"):
            return asked  # type: ignore[return-value]
        if asked == "dryrun" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "offline" if asked == "dryrun" else "disabled"
        return "online" if os.environ.get("WANDB_API_KEY") or _has_login() else "offline"


def _has_login() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "api.wandb.ai" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False
