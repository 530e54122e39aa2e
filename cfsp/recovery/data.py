"""Training data of a recovery: token ids and labels. The label -100 marks a token that is not learnt."""

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
#: The Alpaca prompt format (Stanford Alpaca, Apache-2.0). Rows with prompt and response use their own format.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_RESPONSE_KEYS = ("output", "response", "completion")


@dataclass(frozen=True)
class Example:
    """Training sequence of T tokens.

    Attributes:
        input_ids: token ids, [T].
        labels: token id where the token is learnt, else -100, [T]. The first token is never learnt.
    """

    input_ids: list[int]
    labels: list[int]


def locate_file(data: RecoveryData) -> TextFile:
    """Locate the data file, download it where it is on the hub, and hash its content.

    Raises:
        DataError: there is no such file, it is empty, or the hub cannot be reached.
    """
    hub = None if data.hub is None else HubFile(**asdict(cast(Any, data.hub)))
    section = TextSection(
        path=data.path, hub=hub, text_field=data.text_field, txt_rows=data.txt_rows, join=data.join, bos="none"
    )
    has_rows = data.kind == "instructions"
    formats = ".jsonl, .json, .csv or .parquet" if has_rows else TEXT_FORMS
    streamed = has_rows and data.n_samples is not None
    return locate_text(section, "recovery.data", formats, split=None, streamed=streamed)


def read_instructions(file: TextFile, settings: Training, tokenizer: Any) -> list[Example]:
    """Read rows with prompt and response, and cut them at ``cutoff`` tokens.

    Rows with an empty response, and rows whose prompt fills the ``cutoff`` tokens, are dropped.

    Raises:
        DataError: a row has other keys, or no row has anything to learn within ``cutoff`` tokens.
    """
    pairs = list(islice(_read_pairs(file), settings.data.n_samples))
    answered_pairs = [(prompt, response) for prompt, response in pairs if response.strip()]
    if not answered_pairs:
        reason = "all responses are empty" if pairs else "holds no rows"
        raise DataError(f"recovery.data.path={file.path}: {reason}; give a file of rows with prompt and response")
    if len(answered_pairs) < len(pairs):
        log.warning(
            "recovery data: %d of %d rows left out, their responses are empty",
            len(pairs) - len(answered_pairs), len(pairs),
        )  # fmt: skip
    examples = [
        _build_example(ids, is_response, settings, tokenizer.eos_token_id)
        for ids, is_response in _encode_pairs(answered_pairs, tokenizer)
    ]
    kept = [example for example in examples if any(label != IGNORED for label in example.labels)]
    if not kept:
        raise DataError(
            f"recovery.data.path={file.path}: nothing to learn: within recovery.cutoff={settings.cutoff} tokens no row "
            "reaches its response; use a larger recovery.cutoff, or recovery.response_only=false"
        )
    if len(kept) < len(examples):
        log.warning("recovery data: %d of %d rows dropped, their prompts fill the cutoff of %d tokens",
                    len(examples) - len(kept), len(examples), settings.cutoff)  # fmt: skip
    return pack_examples(kept, settings.cutoff) if settings.packing else kept


def read_windows(file: TextFile, settings: Training, tokenizer: Any) -> list[Example]:
    """Tokenise a text as a whole and cut it into consecutive windows of ``cutoff`` tokens.

    Every token of a window except the first is learnt.

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
    return label_windows([ids[at * length : (at + 1) * length] for at in range(count)][: settings.data.n_samples])


def label_windows(windows: Sequence[Sequence[int]]) -> list[Example]:
    """Return an example for each window of token ids; every token except the first is learnt."""
    return [Example(list(window), [IGNORED, *window[1:]]) for window in windows]


def pack_examples(examples: Sequence[Example], cutoff: int) -> list[Example]:
    """Concatenate examples to sequences of at most ``cutoff`` tokens.

    Attention is not masked between the examples of a sequence, so each one also sees the examples before it.
    """
    packed: list[Example] = []
    for example in examples:
        if packed and len(packed[-1].input_ids) + len(example.input_ids) <= cutoff:
            packed[-1].input_ids.extend(example.input_ids)
            packed[-1].labels.extend(example.labels)
        else:
            packed.append(Example(list(example.input_ids), list(example.labels)))
    return packed


def check_ids(examples: Sequence[Example], limits: Limits) -> None:
    """Check that all token ids are in the model's vocabulary.

    Raises:
        DataError: an id is not in the vocabulary.
    """
    highest = max(max(example.input_ids) for example in examples)
    if highest >= limits.vocab_size:
        raise DataError(
            f"recovery data: id {highest} is outside the model's vocabulary of {limits.vocab_size}; the tokenizer "
            "belongs to another model"
        )


def _build_example(ids: list[int], is_response: list[bool], settings: Training, eos_id: int | None) -> Example:
    """Return an example that ends with EOS, cut at ``cutoff`` tokens; EOS is learnt as part of the response.

    Args:
        ids: token ids of prompt and response.
        is_response: whether each token belongs to the response.
        settings: settings of the training.
        eos_id: id of EOS; None: the tokenizer has none.
    """
    if eos_id is not None and (not ids or ids[-1] != eos_id):
        ids, is_response = [*ids, eos_id], [*is_response, True]
    elif eos_id is not None:
        is_response = [*is_response[:-1], True]
    learnt = is_response if settings.response_only else [True] * len(ids)
    labels = [token if learn and at else IGNORED for at, (token, learn) in enumerate(zip(ids, learnt, strict=True))]
    return Example(ids[: settings.cutoff], labels[: settings.cutoff])


def _encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the token ids of each prompt and response, and for each token whether it belongs to the response."""
    if not tokenizer.is_fast:  # without offsets, prompt and response are tokenised separately
        for prompt, response in pairs:
            prompt_ids = list(tokenizer(prompt, verbose=False)["input_ids"])
            if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:  # EOS must not stand before the response
                prompt_ids.pop()
            response_ids = list(tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"])
            yield prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)
        return
    texts = [prompt + response for prompt, response in pairs]
    encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    for (prompt, _), ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # A token across the border belongs to the response if it holds only white space of the prompt (" Yes").
        border = len(prompt.rstrip())
        # Special tokens have begin == end and so belong to the prompt.
        yield list(ids), [begin >= border and end > max(begin, len(prompt)) for begin, end in offsets]


def _read_pairs(file: TextFile) -> Iterator[tuple[str, str]]:
    """Yield prompt and response of each row of the file."""
    label = f"recovery.data.path={file.path}"
    with reading(label):
        for number, (_, row) in enumerate(rows(file.path, label), 1):
            yield _parse_row(row, number, file.path)


def _parse_row(row: Any, number: int, path: Path) -> tuple[str, str]:
    """Return prompt and response of a row.

    Raises:
        DataError: a key is missing or its value is not text; names the row and the key.
    """
    where = f"recovery.data.path={path}: row {number}"
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {kind_of(row)}; an object with prompt and response is needed")
    response_key = next((key for key in _RESPONSE_KEYS if key in row), None)
    prompt_key = next((key for key in ("instruction", "prompt") if key in row), None)
    if response_key is None or prompt_key is None:
        columns = ", ".join(str(key)[:40] for key in islice(row, 10))
        raise DataError(
            f"{where} has {columns or 'nothing'}; needed: instruction, (input,) output, or prompt, response"
        )
    input_key = next((key for key in ("input", "context") if row.get(key) is not None), None)
    for key in (prompt_key, response_key, input_key if prompt_key == "instruction" else None):
        if key is not None:
            _check_text(row[key], f"{where}: {key}")
    if prompt_key == "prompt":
        return row["prompt"], row[response_key]
    input_text = row[input_key] if input_key is not None else ""
    template = PROMPT_WITH_INPUT if input_text.strip() else PROMPT
    return template.format(instruction=row["instruction"], input=input_text), row[response_key]


def _check_text(value: Any, source: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{source} is {kind_of(value)}; text is needed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{source} holds half of a character ({error.reason}); write it as valid UTF-8") from error
