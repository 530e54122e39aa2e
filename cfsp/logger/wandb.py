"""Logger that mirrors the record to Weights & Biases: online if an API key is configured, otherwise offline."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cfsp.config.components import component
from cfsp.config.contracts import RunLogger

if TYPE_CHECKING:
    from cfsp.record.run_record import RunRecord

log = logging.getLogger(__name__)

#: Files of the output folder that are uploaded if they exist. Model folders are not uploaded.
_FILES = ("record.json", "plan.json", "config.yaml", "blocks.png", "recovery.png")


@component
class WandbLogger(RunLogger):
    """Logger for Weights & Biases: one W&B run for each run of cfsp, with the run_id as its id.

    Config, summary, curves, figures and files are those of the record. An online run is created at the start and
    receives the training curves while the model trains. An offline run is written at the end from the record, so a
    killed run leaves none. ``wandb sync OUT/wandb/offline-run-*`` uploads it later.

    Attributes:
        project: W&B project.
        entity: W&B user or team; None: the default of the account.
        group: W&B group; None: no group.
        tags: tags of the run.
        mode: online or offline; auto: online if an API key is configured.
    """

    project: str = "cfsp"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline"] = "auto"

    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        """Start an online run; an offline run is written only by :meth:`finish`."""
        if self._mode() == "online":
            self._init(run_id, folder, configuration)

    def log(self, values: dict[str, Any]) -> None:
        """Log a step of the training to the online run."""
        import wandb

        if wandb.run is not None:
            wandb.log(values)

    def finish(self, record: RunRecord, folder: Path) -> None:
        """Write summary, figures and files of the record, and end the W&B run."""
        if self._mode() == "disabled":
            return
        import wandb

        if wandb.run is None or wandb.run.id != record.run_id:
            self._init(record.run_id, folder, record.configuration)
            for row in (record.recovery or {}).get("history", ()):
                self.log({f"recovery/{key}": value for key, value in row.items()})
        run = wandb.run
        assert run is not None
        run.summary.update({"status": record.status, **_summary(record)})
        if record.error is not None:
            run.summary.update({"error": f"{record.error['type']}: {record.error['message']}"})
        rows = [(side, row) for side, figures in record.measurements.items() for row in figures]
        if rows:
            columns = ["suite", "task", "metric", "value", "stderr", "n", "seq_len", "unit"]
            data = [[side, *(row.get(column) for column in columns)] for side, row in rows]
            wandb.log({"measurements": wandb.Table(columns=["side", *columns], data=data)})
        for image in ("blocks", "recovery"):
            if (folder / f"{image}.png").is_file():
                wandb.log({image: wandb.Image(str(folder / f"{image}.png"))})
        present = {name: folder / name for name in _FILES if (folder / name).is_file()}
        self._log_artifact(record.run_id, "run", present)
        wandb.finish(exit_code=0 if record.status == "success" else 1)

    def files(self, name: str, folder: Path, files: Mapping[str, Path]) -> None:
        """Log files with tables and figures of several runs as a separate W&B run."""
        if self._mode() == "disabled":
            return
        import wandb

        self._init(name, folder, {"files": sorted(files)}, job_type="tables")
        self._log_artifact(name, "tables", files)
        for file, path in files.items():
            if path.suffix == ".png":
                wandb.log({file.removesuffix(".png"): wandb.Image(str(path))})
        wandb.finish()

    def _init(self, name: str, folder: Path, configuration: dict[str, Any], job_type: str = "run") -> None:
        import wandb

        # Offline runs of an earlier attempt are replaced, so that each run of cfsp has only one W&B run.
        for earlier in (folder / "wandb").glob(f"offline-run-*-{name}"):
            shutil.rmtree(earlier)
        folder.mkdir(parents=True, exist_ok=True)
        mode = self._mode()
        wandb.init(
            project=self.project, entity=self.entity, group=self.group, tags=list(self.tags), id=name, name=name,
            job_type=job_type, dir=str(folder.resolve()), config=configuration, mode=mode, reinit="finish_previous",
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )  # fmt: skip

    def _log_artifact(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        import wandb

        artifact = wandb.Artifact(name, type=kind)
        for file, path in files.items():
            # "immutable" uploads the file from its path. Otherwise a copy stays in the home folder until it is synced.
            artifact.add_file(str(path.resolve()), name=file, policy="immutable")
        wandb.log_artifact(artifact)

    def _mode(self) -> Literal["online", "offline", "disabled"]:
        """Return the mode from the settings, the environment variables of wandb, or the login."""
        if self.mode != "auto":
            return self.mode
        environment = os.environ.get("WANDB_MODE")
        if environment in ("online", "offline", "disabled"):
            return environment  # type: ignore[return-value]
        if environment == "dryrun" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "offline" if environment == "dryrun" else "disabled"
        return "online" if os.environ.get("WANDB_API_KEY") or _has_login() else "offline"


def _summary(record: RunRecord) -> dict[str, Any]:
    """Return the values of the W&B summary: figures, achieved sizes, LoRA ranks and seconds of stages."""
    figures: dict[str, Any] = {
        f"{side}/{row['suite']}/{row['task']}/{row['metric']}": row["value"]
        for side, rows in record.measurements.items()
        for row in rows
    }
    if record.plan is not None:
        figures |= {f"achieved/{key}": value for key, value in record.plan["achieved"].items()}
    ranks = (record.recovery or {}).get("ranks", ())
    figures |= {f"recovery/rank/block {at}": rank for at, rank in enumerate(ranks) if rank is not None}
    return figures | {f"seconds/{stage['name']}": stage["seconds"] for stage in record.stages}


def _has_login() -> bool:
    """Return whether the netrc file has an entry for W&B."""
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "api.wandb.ai" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False
