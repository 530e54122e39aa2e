"""Trial of a task's items before the run starts, so that a broken item fails the check and not the evaluation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from cfsp.errors import CfspError, DataError, RunError
from cfsp.evaluation.harness import new_tokens
from cfsp.system.hub import fetching

if TYPE_CHECKING:
    from cfsp.data.limits import Limits

log = logging.getLogger(__name__)

#: Number of items of a local task that are rendered; for lm-eval's own tasks it is 1.
TRIED_ITEMS = 200
#: lm-eval's default for the new tokens of a generation task.
_NEW_TOKENS = 256
#: lm-eval's default for the positions, where neither model nor tokenizer state a length.
_POSITIONS = 2048


@contextlib.contextmanager
def name_task_in_errors(key: str, task: str, *, checking: bool) -> Iterator[None]:
    """Convert any error raised inside to a message of one line that names the key and the task.

    Errors of cfsp and out-of-memory errors are not converted.

    Args:
        key: configuration key of the evaluator.
        task: name of the task.
        checking: whether to raise a DataError (before the run) instead of a RunError.
    """
    prefix = f"{key}.tasks={task}"
    try:
        with fetching(prefix, f"local tasks with {key}.include_path=FOLDER"):
            try:
                yield
            except StopIteration as error:  # out of datasets, which looks for the first row of a file
                raise DataError(f"{prefix}: its data set has no items; give one that has, or leave it out") from error
    except (CfspError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            raise
        reason = _reason(error)
        if checking:
            raise DataError(
                f"{prefix}: its items cannot be rendered ({reason}); correct it, or leave it out"
            ) from error
        raise RunError(f"{prefix}: lm-eval failed ({reason})") from error


def try_task(
    task: Any, name: str, key: str, num_fewshot: int | None, items: int, tokenizer: Any, limits: Limits
) -> None:
    """Render the first items of a built task as the harness will: context, choices, target and tokens.

    Args:
        task: task object of lm-eval.
        name: name of the task, for messages.
        key: configuration key of the evaluator, for messages.
        num_fewshot: number of examples before each item; None: the task's own.
        items: number of items to render.
        tokenizer: tokenizer of the model.
        limits: positions and vocabulary of the model.

    Raises:
        DataError: there are no items, a choice is empty, a target is not among the choices, or this kind of task cannot
            be run here.
        Exception: whatever the task's own functions and templates raise.
    """
    prefix = f"{key}.tasks={name}"
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(
            f"{prefix}: it runs code that the model writes (unsafe_code), which is not done here; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"{prefix}: it needs images or sound, and text alone is given to the model; leave it out")
    # lm_eval.simple_evaluate sets both in the same way.
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif num_fewshot:  # lm-eval logs this only at a level that is not shown
        log.warning(
            "%s.num_fewshot=%d: not used for the task %s, which states num_fewshot: 0 itself, so it is measured "
            "without examples; take that line out of its YAML, or leave the key out",
            key, num_fewshot, name,
        )  # fmt: skip
    shots = task.get_config("num_fewshot") or 0
    task.set_fewshot_seed(seed=1234)
    documents = task.eval_docs
    if len(documents) == 0:
        raise DataError(f"{prefix}: it has no items; see its split and its data")
    for index, document in enumerate(islice(documents, items)):
        context = task.fewshot_context(document, num_fewshot=shots, gen_prefix=task.doc_to_prefix(document))
        requests = task.construct_requests(
            doc=document, ctx=context, metadata=(name, index, 1), apply_chat_template=False, chat_template=None
        )
        requests = requests if isinstance(requests, list) else [requests]
        if task.OUTPUT_TYPE == "multiple_choice":
            _check_choices(task, document, f"{prefix}, item {index + 1}")
        for request in requests if index == 0 else ():
            _check_request(request, prefix, tokenizer, limits)


def _check_choices(task: Any, document: Any, prefix: str) -> None:
    choices = task.doc_to_choice(document)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{prefix}: its choices are not a list of texts; see doc_to_choice")
    if not all(f"{task.config.target_delimiter}{choice}" for choice in choices):
        raise DataError(f"{prefix}: a choice is empty; give each a text, or leave the item out")
    if not task.multiple_input:
        target = task.doc_to_target(document)
        targets = target if isinstance(target, list) else [target]
        for gold in targets:
            is_choice = gold in choices if isinstance(gold, str) else isinstance(gold, int) and 0 <= gold < len(choices)
            if not is_choice:
                raise DataError(f"{prefix}: its target {str(gold)[:60]!r} is none of its {len(choices)} choices")


def _check_request(request: Any, prefix: str, tokenizer: Any, limits: Limits) -> None:
    """Check the tokens of a request, which the harness itself checks only during the evaluation.

    Raises:
        DataError: the harness would fail on the request.
    """
    kind, arguments = request.request_type, request.args
    positions = limits.positions or _POSITIONS
    if kind == "generate_until":
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{prefix}: it generates text, and the tokenizer names no EOS to end it with; name it in "
                "tokenizer_config.json, or leave the task out"
            )
        n_new = new_tokens(arguments[1], _NEW_TOKENS)
        if n_new >= positions:
            raise DataError(
                f"{prefix}: it asks for {n_new} new tokens (max_gen_toks), and the model has {positions} positions in "
                "all; leave it out, or set generation_kwargs.max_gen_toks in a local task"
            )
    elif kind == "loglikelihood":
        context, continuation = arguments[0], arguments[1]
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        all_ids = tokenizer(stripped + continuation, verbose=False)["input_ids"]
        context_ids = tokenizer(stripped, verbose=False)["input_ids"] if context else []
        if (context and not context_ids) or len(all_ids) <= len(context_ids):
            raise DataError(
                f"{prefix}: the tokenizer makes no tokens of "
                f"{(context[-30:] if context_ids == [] else continuation[:30])!r}; correct the item"
            )
        if len(all_ids) - len(context_ids) > positions:
            raise DataError(
                f"{prefix}: an answer has {len(all_ids) - len(context_ids)} tokens, and the model has {positions} "
                "positions; leave the task out"
            )


def _reason(error: Exception) -> str:
    """Return the error in one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
