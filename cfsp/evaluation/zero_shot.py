"""Zero-shot tasks through lm-evaluation-harness: its own tasks by name, and local task YAMLs."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field, PlainValidator

from cfsp.config.components import component, suggest, with_key
from cfsp.config.contracts import Evaluator
from cfsp.config.deciding import Decides, deciding_settings
from cfsp.errors import ConfigError, DataError
from cfsp.evaluation.harness import (
    count_truncated,
    harness_tasks,
    quiet_harness,
    report_requests,
    task_manager,
    with_special_tokens,
)
from cfsp.evaluation.measurement import Measurement
from cfsp.evaluation.task_folder import hash_task_files, local_tasks, with_absolute_data
from cfsp.evaluation.task_trial import TRIED_ITEMS, name_task_in_errors, try_task
from cfsp.evaluation.values import validate_batch_size, validate_limit
from cfsp.system.package import package_path
from cfsp.system.progress import watched

if TYPE_CHECKING:
    from torch import nn

    from cfsp.data.limits import Limits
    from cfsp.evaluation.task_folder import TaskFile

_METRIC_UNITS = {"acc": "fraction", "acc_norm": "fraction", "exact_match": "fraction", "f1": "fraction"}
#: Trials that succeeded in this process; the runs of a sweep repeat the same ones.
_succeeded_trials: set[str] = set()


@component
class ZeroShot(Evaluator):
    """Tasks of lm-evaluation-harness.

    The harness runs without its response cache, which is keyed by the prompt alone and would answer for another model.

    Attributes:
        tasks: lm-eval's names of tasks or groups, or names of local ones.
        include_path: folder of local task YAMLs, with their data files beside them.
        num_fewshot: number of examples before each item; None: the task's own.
        limit: items of each task, or below 1 a share of them, as in lm-eval; None: all.
        batch_size: requests at a time.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    include_path: Annotated[str | None, Decides("content")] = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int | float | None, PlainValidator(validate_limit)] = None
    batch_size: Annotated[int, PlainValidator(validate_batch_size)] = 16

    side_by_side: ClassVar[bool] = False
    key: ClassVar[str] = "evaluation.zero_shot"

    def check(self, tokenizer: Any, limits: Limits) -> dict[str, Any]:
        """Check settings and build every task; see :meth:`cfsp.config.contracts.Evaluator.check`."""
        identity = self.check_settings()
        if tokenizer is not None:  # the identity alone needs no tokenizer
            self._try_tasks(identity, tokenizer, limits)
        return identity

    def task_folder(self) -> str | None:
        """Return the folder of local tasks, whose functions are run as code."""
        return self.include_path

    def check_settings(self) -> dict[str, Any]:
        """Run the part of :meth:`check` that builds no task and fetches no data."""
        local = self._local_tasks()
        remote_tasks = [name for name in self.tasks if name not in local]
        for name in remote_tasks:
            if "/" in name or name.endswith((".yaml", ".yml")):
                raise ConfigError(
                    f"{self.key}.tasks={name}: this is a path, and tasks are given by name; use "
                    f"{self.key}.tasks=[NAME] with {self.key}.include_path=FOLDER plugins.allow=[tasks]"
                )
        if remote_tasks:
            known = harness_tasks()
            for name in remote_tasks:
                if name not in known:
                    near = suggest(name, [*local, *known])
                    raise ConfigError(f"{self.key}.tasks={name}: lm-eval has no such task{near}")
        folder = self._folder()
        content = {
            name: hash_task_files(local[name], folder, self.key) for name in local if name in self.tasks and folder
        }
        return deciding_settings(self) | {"local": content}

    def _try_tasks(self, identity: dict[str, Any], tokenizer: Any, limits: Limits) -> None:
        """Build each task, which locates its data, and render its first items.

        Equal trials are run once in a process.
        """
        tokenizer = with_special_tokens(tokenizer)
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise DataError(
                f"{self.key}: the tokenizer names neither BOS nor EOS and config.json states no bos_token_id or "
                "eos_token_id within its vocabulary, one of which lm-eval starts from; name one in "
                "tokenizer_config.json, or use "
                f"{self.key}=null"
            )
        deciding = {name: value for name, value in identity.items() if name != "batch_size"}
        content = getattr(tokenizer, "content_fingerprint", None)
        trial_key = repr((deciding, self._folder(), self.key, content, limits)) if content else None
        if trial_key in _succeeded_trials:
            return
        with quiet_harness(self._folder(), self.key):
            local = self._local_tasks()
            manager = self._task_manager(local)
            for name in self.tasks:
                with name_task_in_errors(self.key, name, checking=True):
                    for leaf, task in manager.load([self._task_argument(name, local)])["tasks"].items():
                        items = TRIED_ITEMS if name in local else 1
                        if isinstance(self.limit, int):
                            items = min(items, self.limit)
                        label = name if leaf == name else f"{name} ({leaf})"
                        try_task(task, label, self.key, self.num_fewshot, items, tokenizer, limits)
        if trial_key is not None:
            _succeeded_trials.add(trial_key)

    def parts(self) -> dict[str, ZeroShot]:
        """Divide the evaluator by task."""
        return {task: with_key(replace(cast(Any, self), tasks=[task]), self.key) for task in self.tasks}

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        """Run the tasks with the harness."""
        import lm_eval

        # Start-up time: loads lm_eval, torch.
        from cfsp.evaluation.streamed_harness import build_harness

        names = ",".join(self.tasks)
        with quiet_harness(self._folder(), self.key), name_task_in_errors(self.key, names, checking=False):
            harness = build_harness(model, tokenizer=with_special_tokens(tokenizer), batch_size=self.batch_size)
            truncated = count_truncated(harness)
            if not watched():  # the harness draws its bars even where tqdm is switched off
                for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                    setattr(harness, name, partial(getattr(harness, name), disable_tqdm=True))
                # Rolling requests draw a bar for each batch of windows, even with disable_tqdm.
                loglikelihood_tokens = harness._loglikelihood_tokens
                harness._loglikelihood_tokens = lambda requests, disable_tqdm=True, override_bs=None: (
                    loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
                )
            local = self._local_tasks()
            with report_requests(harness, f"zero-shot {names}"):
                results = lm_eval.simple_evaluate(
                    model=harness,
                    tasks=[self._task_argument(name, local) for name in self.tasks],
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=1000,  # 0 would drop the analytic standard errors as well
                    task_manager=self._task_manager(local),
                    log_samples=True,  # carries the hashes of items, prompts and targets
                )
        return self._measurements(results, harness.max_length, truncated)

    def _measurements(
        self, results: dict[str, Any], max_length: int, truncated: Counter[str] | None = None
    ) -> list[Measurement]:
        measurements = []
        for task, values in results["results"].items():
            items = self._describe_items(task, results, truncated or Counter())
            for entry, value in values.items():
                metric, _, filter_name = entry.partition(",")
                if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                stderr = values.get(f"{metric}_stderr,{filter_name}")
                measurements.append(
                    Measurement(
                        "zero_shot", task, metric, float(value), _METRIC_UNITS.get(metric, metric),
                        n=items["n"], seq_len=max_length,
                        stderr=float(stderr) if isinstance(stderr, int | float) else None,
                        split=items["split"], num_fewshot=items["num_fewshot"],
                        version=str(results["versions"].get(task)), limit=self.limit,
                        detail={"filter": filter_name, **items["detail"]},
                    )
                )  # fmt: skip
        return measurements

    def _describe_items(self, task: str, results: dict[str, Any], truncated: Counter[str]) -> dict[str, Any]:
        """Return facts of a task's measured items; for a group, those of all members together and of each member."""
        leaves = _leaves(task, results.get("group_subtasks", {}))
        if leaves == [task]:
            config = results["configs"].get(task, {})
            shots = results.get("n-shot", {}).get(task)
            # A task that states num_fewshot: 0 keeps it.
            unused = {} if self.num_fewshot in (None, shots) else {"num_fewshot_not_used": self.num_fewshot}
            return {
                "n": results["n-samples"].get(task, {}).get("effective"),
                "split": config.get("test_split") or config.get("validation_split"),
                "num_fewshot": shots,
                "detail": {
                    "task_hash": _task_hash(results["samples"].get(task, [])),
                    "truncated": truncated[task],
                    **unused,
                },
            }
        members = {leaf: self._describe_items(leaf, results, truncated) for leaf in leaves}
        member_facts = {
            leaf: {
                "n": facts["n"],
                "num_fewshot": facts["num_fewshot"],
                "task_hash": facts["detail"]["task_hash"],
                "truncated": facts["detail"]["truncated"],
            }
            for leaf, facts in members.items()
        }
        return {
            "n": sum(facts["n"] or 0 for facts in members.values()),
            "split": _common(facts["split"] for facts in members.values()),
            "num_fewshot": _common(facts["num_fewshot"] for facts in members.values()),
            "detail": {
                "task_hash": hashlib.sha256(
                    "".join(f"{leaf} {facts['task_hash']}\n" for leaf, facts in member_facts.items()).encode()
                ).hexdigest(),
                "truncated": sum(facts["truncated"] for facts in member_facts.values()),
                "members": member_facts,
            },
        }

    def _folder(self) -> Path | None:
        return package_path(self.include_path) if self.include_path is not None else None

    def _local_tasks(self) -> dict[str, list[TaskFile]]:
        return local_tasks(self.include_path, self.key)

    def _task_argument(self, name: str, local: dict[str, list[TaskFile]]) -> str | dict[str, Any]:
        """Return the harness's argument for a task: plain tasks as dictionaries with absolute paths, others by name."""
        files = local.get(name, [])
        if len(files) != 1 or not files[0].is_plain or files[0].content["task"] != name:
            return name
        return copy.deepcopy(with_absolute_data(files[0].content, files[0].path.parent))

    def _task_manager(self, local: dict[str, list[TaskFile]]) -> Any:
        chosen = {file for name in self.tasks for file in local.get(name, [])}
        requested = {*self.tasks, *(member for file in chosen for member in file.members)}
        # Hash of the files, since the folder may have changed since this process read it.
        content = hashlib.sha256(repr([(str(f.path), f.content) for group in local.values() for f in group]).encode())
        folder = self._folder()
        digest = content.hexdigest() if local else ""
        return task_manager(str(folder) if local else None, bool(requested - set(local)), digest)


def _leaves(task: str, members: dict[str, list[str]]) -> list[str]:
    """Return the tasks of a group and of the groups in it, in order; for a single task, the task itself."""
    if not members.get(task):
        return [task]
    return list(dict.fromkeys(leaf for member in members[task] for leaf in _leaves(member, members)))


def _common(values: Any) -> Any:
    """Return the value that all of ``values`` have; None where they differ."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else None


def _task_hash(samples: list[dict[str, Any]]) -> str | None:
    """Return the task hash of the harness's evaluation tracker: sha256 over hashes of items, prompts and targets."""
    parts = [sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples]
    return hashlib.sha256("".join(parts).encode()).hexdigest() if parts else None
