"""Wrapper of lm-evaluation-harness: no logs, sandboxed templates, no reports on the machine, and counted requests.

Everything that is changed in the library is restored when :func:`quiet_harness` is left.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from cfsp.errors import DataError
from cfsp.evaluation.task_folder import check_task_file, with_absolute_data
from cfsp.system.package import ROOT
from cfsp.system.progress import working


@contextlib.contextmanager
def quiet_harness(folder: Path | None = None, key: str = "evaluation.zero_shot") -> Iterator[None]:
    """Suppress logs, progress bars, and calls of git and pip of the harness, and restore the random generators' states.

    Templates are rendered in a sandbox. Among the task files outside lm-eval and cfsp, only those in ``folder`` may
    contain functions (:func:`cfsp.evaluation.task_folder.check_task_file`).

    Args:
        folder: folder of local tasks; None: there is none.
        key: configuration key of the evaluator, for messages.
    """
    import datasets
    import numpy as np
    import torch

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with _replace_harness_functions(folder, key):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _replace_harness_functions(folder: Path | None, key: str) -> Iterator[None]:
    """Replace functions of the harness by restricted ones while the context is active."""
    import lm_eval.evaluator
    import lm_eval.utils

    replacements: list[tuple[Any, str, Any]] = [
        (lm_eval.utils, "env", _sandbox(lm_eval.utils.env)),
        # Both write reports that cfsp does not use: `git describe` writes to the console, `pip list` takes seconds.
        (lm_eval.evaluator, "add_env_info", lambda storage: None),
        (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
    ]
    # These modules are private and may be missing in another version; check_task_file runs before in any case.
    with contextlib.suppress(ImportError, AttributeError):
        import lm_eval.tasks._factory
        import lm_eval.tasks._yaml_loader

        loader = _restrict_loader(lm_eval.tasks._yaml_loader.load_yaml, folder, key)
        # The loader calls itself, through its own module, for the files that a file includes.
        replacements += [
            (module, "load_yaml", loader) for module in (lm_eval.tasks._yaml_loader, lm_eval.tasks._factory)
        ]
    present = [(module, name, new) for module, name, new in replacements if hasattr(module, name)]
    before = [(module, name, getattr(module, name)) for module, name, _ in present]
    try:
        for module, name, new in present:
            setattr(module, name, new)
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


@cache
def _sandbox(environment: Any) -> Any:
    """Return a copy of the harness's template environment with restricted attributes and calls."""
    from jinja2.sandbox import SandboxedEnvironment

    sandbox = SandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    sandbox.filters.update(environment.filters)
    return sandbox


def _restrict_loader(
    load: Callable[..., dict[str, Any]], folder: Path | None, key: str
) -> Callable[..., dict[str, Any]]:
    """Return a loader of task files that checks files with functions and makes paths of data files absolute."""
    import lm_eval.tasks

    trusted = [Path(lm_eval.tasks.__file__).resolve().parent, ROOT]

    def load_yaml(path: Any, *, resolve_func: bool = True, **settings: Any) -> dict[str, Any]:
        place = Path(path).expanduser().resolve()
        if resolve_func and not any(place.is_relative_to(root) for root in trusted):
            if folder is None:
                raise DataError(f"{key}.tasks: {place} lies outside {key}.include_path; give its folder there")
            check_task_file(place, folder, key)
        return with_absolute_data(load(path, resolve_func=resolve_func, **settings), place.parent)

    return load_yaml


@cache
def task_manager(include_path: str | None, include_defaults: bool, content: str = "") -> Any:
    """Return the harness's index of tasks. It is cached, because the harness's own tasks are thousands of files.

    Args:
        include_path: folder of local tasks; None: there is none.
        include_defaults: whether the harness's own tasks are indexed.
        content: hash of the folder's YAML files, part of the cache's key.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def harness_tasks() -> set[str]:
    """Return the names of the harness's own tasks."""
    with quiet_harness():
        return set(task_manager(None, True).all_tasks)


def with_special_tokens(tokenizer: Any) -> Any:
    """Copy a tokenizer, and add BOS and EOS from the model's configuration where the tokenizer names no EOS.

    A tokenizer that names only EOS gets no BOS, because the harness has always started from EOS in this case.
    """
    tokenizer = copy.deepcopy(tokenizer)
    stated = getattr(tokenizer, "declared_ids", {})
    missing = ["eos"] if tokenizer.eos_token_id is None else []
    missing += ["bos"] if missing and tokenizer.bos_token_id is None else []
    for name in missing:
        token = tokenizer.convert_ids_to_tokens(stated[name]) if name in stated else None
        if token is not None:
            setattr(tokenizer, f"{name}_token", token)
    return tokenizer


def count_truncated(harness: Any) -> Counter[str]:
    """Count, by task, the requests of a harness model that are cut on the left to fit its positions.

    The counter is filled from now on. Rolling requests are split into windows instead and lose nothing.

    Args:
        harness: an lm-eval model, whose methods are wrapped.
    """
    truncated: Counter[str] = Counter()
    loglikelihood, loglikelihood_tokens, generate = (
        getattr(harness, name) for name in ("loglikelihood", "_loglikelihood_tokens", "generate_until")
    )
    pending: list[Any] = []

    def counted_loglikelihood(requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        pending[:] = requests
        try:
            return loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            pending.clear()

    def counted_tokens(requests: Sequence[Any], *arguments: Any, **settings: Any) -> Any:
        for instance, (_, context, continuation) in zip(pending, requests, strict=False):
            if len(context) + len(continuation) > harness.max_length + 1:
                truncated[str(instance.task_name)] += 1
        pending.clear()  # rolling requests come here too, and must not be matched with these
        return loglikelihood_tokens(requests, *arguments, **settings)

    def counted_generation(requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        for instance in requests:
            text, settings = instance.args[:2]
            room = harness.max_length - new_tokens(settings, harness.max_gen_toks)
            if len(harness.tok_encode(text)) > room:
                truncated[str(instance.task_name)] += 1
        return generate(requests, disable_tqdm=disable_tqdm)

    harness.loglikelihood = counted_loglikelihood
    harness._loglikelihood_tokens = counted_tokens
    harness.generate_until = counted_generation
    return truncated


@contextlib.contextmanager
def report_requests(harness: Any, label: str) -> Iterator[None]:
    """Write progress lines for the requests of a harness model where no progress bar is shown.

    Requests are counted as the model computes them, one row of a batch each. Requests with the same context and
    continuations of one token share a row, so the count may end early.

    Args:
        harness: an lm-eval model, whose methods are wrapped inside the context.
        label: what is measured.
    """
    names = ("_loglikelihood_tokens", "_model_call", "_model_generate")
    before = {name: getattr(harness, name) for name in names if hasattr(harness, name)}
    with working(label, None, "request") as work:

        def tokens(requests: Sequence[Any], *arguments: Any, **settings: Any) -> Any:
            work.total, work.done, work.started = len(requests), 0, time.monotonic()
            return before["_loglikelihood_tokens"](requests, *arguments, **settings)

        def counting(name: str, *arguments: Any, **settings: Any) -> Any:
            result = before[name](*arguments, **settings)
            batch = arguments[0] if arguments else settings.get("inps", settings.get("context"))
            work.advance(len(batch) if batch is not None else 0)
            return result

        harness._loglikelihood_tokens = tokens
        for name in before.keys() - {"_loglikelihood_tokens"}:
            setattr(harness, name, partial(counting, name))
        try:
            yield
        finally:
            for name, method in before.items():
                setattr(harness, name, method)


def new_tokens(settings: Any, default: int) -> int:
    """Return the largest number of tokens that a generation request asks for."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(copy.deepcopy(settings), default)["max_gen_toks"])
