"""Training data of a recovery: token ids, and labels that say which tokens are learnt (-100: not this one)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cfsp.config.sections import HubFile, TextSection
from cfsp.data.limits import Limits
from cfsp.data.read_errors import reading
from cfsp.data.rows import kind_of, rows
from cfsp.data.text import TEXT_FORMS, TextFile, locate_text, read_text, tokenise
from cfsp.errors import DataError

if TYPE_CHECKING:
    from cfsp.recovery.settings import RecoveryData, Training

log = logging.getLogger(__name__)

IGNORED = -100
#: The Alpaca prompt format (Stanford Alpaca, Apache-2.0); a row of prompt and response brings its own.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ANSWERS = ("output", "response", "completion")


@dataclass(frozen=True)
class Example:
    """One sequence: ``labels`` [T] are ``input_ids`` [T] where the token is learnt; the first never is."""

    input_ids: list[int]
    labels: list[int]


def locate(data: RecoveryData) -> TextFile:
    """The file, with its content's digest.

    Raises:
        DataError: no such file, an empty one, or the hub is out of reach.
    """
    hub = None if data.hub is None else HubFile(**asdict(cast(Any, data.hub)))
    section = TextSection(
        path=data.path, hub=hub, text_field=data.text_field, txt_rows=data.txt_rows, join=data.join, bos="none"
    )
    rows_only = data.kind == "instructions"
    forms = ".jsonl, .json, .csv or .parquet" if rows_only else TEXT_FORMS
    streamed = rows_only and data.n_samples is not None
    return locate_text(section, "recovery.data", forms, split=None, streamed=streamed)


def instructions(file: TextFile, settings: Training, tokenizer: Any) -> list[Example]:
    """Rows as prompt and response, cut at ``cutoff`` tokens; rows of which nothing is left to learn are dropped.

    Raises:
        DataError: a row has other keys, or no row has anything to learn within ``cutoff`` tokens.
    """
    read = list(islice(_rows(file), settings.data.n_samples))
    rows = [pair for pair in read if pair[1].strip()]
    if not rows:
        reason = "all responses are empty" if read else "holds no rows"
        raise DataError(f"recovery.data.path={file.path}: {reason}; give a file of rows with prompt and response")
    if len(rows) < len(read):
        log.warning(
            "recovery data: %d of %d rows left out, their responses are empty", len(read) - len(rows), len(read)
        )
    examples = [_example(*encoded, settings, tokenizer.eos_token_id) for encoded in _encoded(rows, tokenizer)]
    kept = [example for example in examples if any(label != IGNORED for label in example.labels)]
    if not kept:
        raise DataError(
            f"recovery.data.path={file.path}: nothing to learn: within recovery.cutoff={settings.cutoff} tokens no row "
            "reaches its response; use a larger recovery.cutoff, or recovery.response_only=false"
        )
    if len(kept) < len(examples):
        log.warning("recovery data: %d of %d rows dropped, their prompts fill the cutoff of %d tokens",
                    len(examples) - len(kept), len(examples), settings.cutoff)  # fmt: skip
    return pack(kept, settings.cutoff) if settings.packing else kept


def windows(file: TextFile, settings: Training, tokenizer: Any) -> list[Example]:
    """A text as consecutive windows of ``cutoff`` tokens, tokenised once; every token but a window's first is learnt.

    Raises:
        DataError: the text is shorter than one window.
    """
    ids = tokenise(read_text(file), tokenizer, "none").tolist()
    length = settings.cutoff
    count = len(ids) // length
    if not count:
        raise DataError(
            f"recovery.data.path={file.path}: {len(ids)} tokens are less than one window of "
            f"recovery.cutoff={length}; use a longer text or a smaller cutoff"
        )
    return of_windows([ids[at * length : (at + 1) * length] for at in range(count)][: settings.data.n_samples])


def of_windows(rows: Sequence[Sequence[int]]) -> list[Example]:
    """Windows of which every token but the first is learnt."""
    return [Example(list(row), [IGNORED, *row[1:]]) for row in rows]


def pack(examples: Sequence[Example], cutoff: int) -> list[Example]:
    """Examples one after the other in sequences of at most ``cutoff`` tokens; they see what stands before them."""
    packed: list[Example] = []
    for example in examples:
        if packed and len(packed[-1].input_ids) + len(example.input_ids) <= cutoff:
            packed[-1].input_ids.extend(example.input_ids)
            packed[-1].labels.extend(example.labels)
        else:
            packed.append(Example(list(example.input_ids), list(example.labels)))
    return packed


def check_ids(examples: Sequence[Example], limits: Limits) -> None:
    """Raises DataError where the tokenizer gives ids that the model does not have."""
    highest = max(max(example.input_ids) for example in examples)
    if highest >= limits.vocab_size:
        raise DataError(
            f"recovery data: id {highest} is outside the model's vocabulary of {limits.vocab_size}; the tokenizer is "
            "another model's"
        )


def _example(ids: list[int], is_response: list[bool], settings: Training, eos_id: int | None) -> Example:
    """``is_response``: which of ``ids`` belong to the response. It ends with EOS, which is learnt with it."""
    if eos_id is not None and (not ids or ids[-1] != eos_id):
        ids, is_response = [*ids, eos_id], [*is_response, True]
    elif eos_id is not None:
        is_response = [*is_response[:-1], True]
    learnt = is_response if settings.response_only else [True] * len(ids)
    labels = [token if learn and at else IGNORED for at, (token, learn) in enumerate(zip(ids, learnt, strict=True))]
    return Example(ids[: settings.cutoff], labels[: settings.cutoff])


def _encoded(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each prompt with its response, and which of them are the response's."""
    if not tokenizer.is_fast:  # no offsets: the two parts are tokenised each for itself
        for prompt, response in pairs:
            before = list(tokenizer(prompt, verbose=False)["input_ids"])
            if before and before[-1] == tokenizer.eos_token_id:  # it would end what has not begun
                before.pop()
            after = list(tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"])
            yield before + after, [False] * len(before) + [True] * len(after)
        return
    texts = [prompt + response for prompt, response in pairs]
    encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    for (prompt, _), ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # A token over the border is the response's where only white space of the prompt is in it (" Yes").
        border = len(prompt.rstrip())
        # Special tokens have no extent.
        yield list(ids), [begin >= border and end > max(begin, len(prompt)) for begin, end in offsets]


def _rows(file: TextFile) -> Iterator[tuple[str, str]]:
    label = f"recovery.data.path={file.path}"
    with reading(label):
        for number, (_, row) in enumerate(rows(file.path, label), 1):
            yield _pair(row, number, file.path)


def _pair(row: Any, number: int, path: Path) -> tuple[str, str]:
    """Prompt and response of a row.

    Raises:
        DataError: names the row and what is missing or no text.
    """
    where = f"recovery.data.path={path}: row {number}"
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {kind_of(row)}; an object with prompt and response is needed")
    response_key = next((key for key in _ANSWERS if key in row), None)
    question = next((key for key in ("instruction", "prompt") if key in row), None)
    if response_key is None or question is None:
        columns = ", ".join(str(key)[:40] for key in islice(row, 10))
        raise DataError(
            f"{where} has {columns or 'nothing'}; needed: instruction, (input,) output, or prompt, response"
        )
    extra = next((key for key in ("input", "context") if row.get(key) is not None), None)
    for key in (question, response_key, extra if question == "instruction" else None):
        if key is not None:
            _check_text(row[key], f"{where}: {key}")
    if question == "prompt":
        return row["prompt"], row[response_key]
    added = row[extra] if extra is not None else ""
    form = PROMPT_WITH_INPUT if added.strip() else PROMPT
    return form.format(instruction=row["instruction"], input=added), row[response_key]


def _check_text(value: Any, source: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{source} is {kind_of(value)}; text is needed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{source} holds half of a character ({error.reason}); write it as valid UTF-8") from error
