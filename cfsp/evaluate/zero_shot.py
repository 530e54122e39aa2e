"""Zero-shot tasks through lm-evaluation-harness: its own task names, and local task YAMLs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from cfsp.components import component, suggest
from cfsp.data.calibration import Limits
from cfsp.errors import ConfigError, DataError
from cfsp.evaluate.measurement import Measurement
from cfsp.package import package_path

log = logging.getLogger(__name__)
_METRIC_UNITS = {"acc": "fraction", "acc_norm": "fraction", "exact_match": "fraction", "f1": "fraction"}


@component
class ZeroShot:
    """``tasks``: lm-eval names; ``include_path``: a folder of further task YAMLs, whose data files lie beside them.

    The harness is used as it is, without its response cache (which is keyed by prompt only and would answer for
    another model).
    """

    tasks: list[str]
    include_path: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16

    side_by_side: ClassVar[bool] = False

    def check(self, tokenizer: Any, limits: Limits) -> dict[str, Any]:
        local = self._local_tasks()
        others = [name for name in self.tasks if name not in local]
        if others:
            known = _harness_tasks()
            for name in others:
                if name not in known:
                    near = suggest(name, [*local, *known])
                    raise ConfigError(f"evaluation.zero_shot.tasks={name}: lm-eval has no such task{near}")
        content = {name: _content(path) for name, path in local.items() if name in self.tasks}
        return {"tasks": self.tasks, "num_fewshot": self.num_fewshot, "limit": self.limit, "local": content}

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        with _quiet_harness():
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)  # type: ignore[arg-type]
            local = self._local_tasks()
            tasks = [_absolute(local[name]) if name in local else name for name in self.tasks]
            try:
                results = lm_eval.simple_evaluate(
                    model=harness,
                    tasks=tasks,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=0,
                    task_manager=TaskManager(include_defaults=bool(set(self.tasks) - set(local))),
                    log_samples=False,
                )
            except (ConnectionError, OSError) as error:
                raise DataError(
                    f"evaluation.zero_shot.tasks={self.tasks}: a task's data cannot be fetched "
                    f"({type(error).__name__}: {str(error).splitlines()[0]}); fetch it while online, or give local "
                    "tasks with evaluation.zero_shot.include_path=FOLDER"
                ) from error
        return self._measurements(results)

    def _measurements(self, results: dict[str, Any]) -> list[Measurement]:
        found = []
        for task, values in results["results"].items():
            counts = results["n-samples"].get(task, {})
            for entry, value in values.items():
                metric, _, filter_name = entry.partition(",")
                if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                stderr = values.get(f"{metric}_stderr,{filter_name}")
                config = results["configs"].get(task, {})
                found.append(
                    Measurement(
                        "zero_shot", task, metric, float(value), _METRIC_UNITS.get(metric, metric),
                        n=counts.get("effective"), stderr=float(stderr) if isinstance(stderr, int | float) else None,
                        split=config.get("test_split") or config.get("validation_split"),
                        num_fewshot=results.get("n-shot", {}).get(task),
                        version=str(results["versions"].get(task)), limit=self.limit,
                        detail={"filter": filter_name, "task_hash": results.get("task_hashes", {}).get(task)},
                    )
                )  # fmt: skip
        return found

    def _local_tasks(self) -> dict[str, Path]:
        if self.include_path is None:
            return {}
        folder = package_path(self.include_path)
        if not folder.is_dir():
            raise DataError(f"evaluation.zero_shot.include_path={self.include_path}: no such folder")
        found = {}
        for path in sorted(folder.glob("**/*.yaml")):
            name = _read_task(path).get("task")
            if isinstance(name, str):
                found[name] = path
        return found


def _read_task(path: Path) -> dict[str, Any]:
    from lm_eval.utils import load_yaml_config

    try:
        return load_yaml_config(path, mode="simple")
    except TypeError:
        return load_yaml_config(path)
    except Exception as error:
        raise DataError(f"evaluation.zero_shot.include_path: {path} is not a task YAML ({error})") from error


def _absolute(path: Path) -> dict[str, Any]:
    """A local task's configuration with its data files found beside it."""
    task = dict(_read_task(path))
    kwargs = dict(task.get("dataset_kwargs") or {})
    files = kwargs.get("data_files")
    if isinstance(files, dict):
        kwargs["data_files"] = {split: str((path.parent / name).resolve()) for split, name in files.items()}
        task["dataset_kwargs"] = kwargs
    return task


def _content(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes())
    files = (_absolute(path).get("dataset_kwargs") or {}).get("data_files") or {}
    for name in sorted(files.values()):
        if not Path(name).is_file():
            raise DataError(f"evaluation.zero_shot: task {path.stem} names the data file {name}, which does not exist")
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()


def _harness_tasks() -> set[str]:
    from lm_eval.tasks import TaskManager

    with _quiet_harness():
        return set(TaskManager().all_tasks)


@contextlib.contextmanager
def _quiet_harness() -> Any:
    """The harness logs at INFO to the root logger's handlers; warnings are enough here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
