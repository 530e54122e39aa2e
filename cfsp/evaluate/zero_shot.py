"""Zero-shot tasks through lm-evaluation-harness: its own task names, and local task YAMLs."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field

from cfsp.components import component, suggest
from cfsp.contracts import Evaluator
from cfsp.errors import ConfigError, DataError
from cfsp.evaluate.measurement import Measurement
from cfsp.package import package_path
from cfsp.progress import watched

if TYPE_CHECKING:
    from torch import nn

    from cfsp.data.calibration import Limits

log = logging.getLogger(__name__)
_METRIC_UNITS = {"acc": "fraction", "acc_norm": "fraction", "exact_match": "fraction", "f1": "fraction"}


@component
class ZeroShot(Evaluator):
    """``tasks``: lm-eval names; ``include_path``: a folder of further task YAMLs, whose data files lie beside them.

    The harness is used as it is, without its response cache (which is keyed by prompt only and would answer for
    another model).
    """

    tasks: Annotated[list[str], Field(min_length=1)]
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
        return {
            "tasks": self.tasks,
            "batch_size": self.batch_size,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "local": content,
        }

    def parts(self) -> dict[str, ZeroShot]:
        return {task: replace(cast(Any, self), tasks=[task]) for task in self.tasks}

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        from cfsp.models.streamed import streamed

        with _quiet_harness():
            store = streamed(model)
            settings = {"tokenizer": copy.deepcopy(tokenizer), "batch_size": self.batch_size}
            if store is None:
                harness = HFLM(pretrained=model, **settings)
            else:
                from cfsp.evaluate.streamed_harness import BlockByBlock

                harness = BlockByBlock(store, **settings)
            if not watched():  # the harness draws its bars whatever tqdm's own switch says
                for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                    setattr(harness, name, partial(getattr(harness, name), disable_tqdm=True))
                # Rolling requests draw one for each batch of windows, whatever they are told.
                asked = harness._loglikelihood_tokens
                harness._loglikelihood_tokens = lambda requests, disable_tqdm=True, override_bs=None: asked(
                    requests, disable_tqdm=True, override_bs=override_bs
                )
            local = self._local_tasks()
            tasks = [_given(name, local[name]) if name in local else name for name in self.tasks]
            try:
                results = lm_eval.simple_evaluate(
                    model=harness,
                    tasks=tasks,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=1000,  # 0 would drop the analytic standard errors as well
                    task_manager=_task_manager(
                        str(package_path(self.include_path)) if self.include_path else None,
                        bool(set(self.tasks) - set(local)),
                    ),
                    log_samples=True,  # carries the hashes of items, prompts and targets
                )
            except (ConnectionError, OSError) as error:
                raise DataError(
                    f"evaluation.zero_shot.tasks={self.tasks}: a task's data cannot be fetched "
                    f"({type(error).__name__}: {str(error).splitlines()[0]}); fetch it while online, or give local "
                    "tasks with evaluation.zero_shot.include_path=FOLDER"
                ) from error
        return self._measurements(results, harness.max_length)

    def _measurements(self, results: dict[str, Any], max_length: int) -> list[Measurement]:
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
                        n=counts.get("effective"), seq_len=max_length,
                        stderr=float(stderr) if isinstance(stderr, int | float) else None,
                        split=config.get("test_split") or config.get("validation_split"),
                        num_fewshot=results.get("n-shot", {}).get(task),
                        version=str(results["versions"].get(task)), limit=self.limit,
                        detail={"filter": filter_name, "task_hash": _task_hash(results["samples"].get(task, []))},
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


def _task_hash(samples: list[dict[str, Any]]) -> str | None:
    """The harness's own task hash (its evaluation tracker): sha256 over the hashes of items, prompts and targets."""
    parts = [sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples]
    return hashlib.sha256("".join(parts).encode()).hexdigest() if parts else None


def _read_task(path: Path) -> dict[str, Any]:
    """A task YAML as a dictionary; ``!function`` values become strings."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")
    try:
        task = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(
            f"evaluation.zero_shot.include_path: {path} is not a task YAML ({' '.join(str(error).split())})"
        ) from error
    return task if isinstance(task, dict) else {}


def _given(name: str, path: Path) -> str | dict[str, Any]:
    """What the harness is given: a plain task with its data files made absolute, else the name for it to load."""
    task = _read_task(path)
    if "include" in task or "!function" in path.read_text(encoding="utf-8"):
        return name
    files = _data_files(task, path)
    if files:
        task["dataset_kwargs"] = {**task["dataset_kwargs"], "data_files": files}
    return task


def _data_files(task: dict[str, Any], path: Path) -> dict[str, str]:
    """split -> absolute path of the data files that a local task names relative to its YAML."""
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if not isinstance(files, dict):
        return {}
    return {split: str((path.parent / name).resolve()) for split, name in files.items() if isinstance(name, str)}


def _content(path: Path) -> str:
    """sha256 over everything local that decides a task: its YAML, what it includes, its functions, its data."""
    digest = hashlib.sha256()
    for file in _local_files(path):
        if not file.is_file():
            raise DataError(
                f"evaluation.zero_shot: task {path.stem} names the file {file}, which does not exist; "
                "put it beside the task's YAML"
            )
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _local_files(path: Path) -> list[Path]:
    """The task's YAML, the YAMLs it includes, the modules of its ``!function`` values and its data files."""
    task = _read_task(path)
    files = [path]
    for included in _strings(task.get("include")):
        files += _local_files(path.parent / included)
    modules = re.findall(r"!function\s+([\w.]+)\.\w+", path.read_text(encoding="utf-8"))
    files += [path.parent / f"{module.replace('.', '/')}.py" for module in modules]
    for name in _strings((task.get("dataset_kwargs") or {}).get("data_files")):
        if "://" not in name:
            # The harness itself looks from the working folder on; a plain task is handed over with absolute paths.
            beside = path.parent / name
            files.append(beside if beside.is_file() or not Path(name).is_file() else Path(name))
    return sorted(set(files))


def _strings(value: Any) -> list[str]:
    """Every string in a value that may be one, a list of them or a dictionary of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _harness_tasks() -> set[str]:
    """The harness's own task names."""
    with _quiet_harness():
        return set(_task_manager(None, True).all_tasks)


@cache
def _task_manager(include_path: str | None, include_defaults: bool) -> Any:
    """The harness's index of tasks; for its own it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """The harness logs much, draws the data sets' progress bars and reseeds every random generator."""
    import datasets
    import numpy as np
    import torch

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
