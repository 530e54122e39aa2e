"""Texts as token ids: reading documents, joining them as published, cutting windows."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cfsp.config.deciding import separate
from cfsp.config.sections import TextSection
from cfsp.data.read_errors import reading
from cfsp.data.rows import rows, text_of
from cfsp.data.text_files import check_file, dataset_digest, file_form, lines, locate_dataset, open_text
from cfsp.errors import DataError
from cfsp.system.digest import file_digest
from cfsp.system.hub import fetch_file
from cfsp.system.hub_errors import hub_error
from cfsp.system.package import package_path

Section = TypeVar("Section", bound=TextSection)


@dataclass(frozen=True)
class TextFile:
    """Text file that was located.

    Attributes:
        key: configuration key of its section.
        path: the file, or the folder of a saved dataset.
        section: its section.
        identity: its content and how it is prepared, for the run identity; the location is not part of it.
        revision: commit of the hub repository; None for a local file.
    """

    key: str
    path: Path
    section: TextSection
    identity: dict[str, Any]
    revision: str | None = None


#: Names of the text files that can be read, for messages.
TEXT_FORMS = ".txt, .jsonl, .csv or .parquet"


def locate_text(
    section: TextSection, key: str, forms: str = TEXT_FORMS, *, split: str | None = "", streamed: bool | None = None
) -> TextFile:
    """Locate the file of a text section: a local path, a saved dataset, or one file of a hub repository.

    Args:
        section: the text section.
        key: configuration key of the section, for messages.
        forms: names of the files that can be read, for messages.
        split: split of a dataset that ``datasets.save_to_disk`` wrote; "": the section's; None: the only one.
        streamed: whether only the first rows are read; None: if the section has ``max_documents``.

    Raises:
        DataError: the file does not exist, is empty or holds no text, or the hub cannot be reached.
    """
    if section.path is not None:
        path = package_path(section.path)
        if os.path.isdir(path):
            chosen = section.split if split == "" else split
            path = locate_dataset(path, chosen, f"{key}.path={section.path}", forms)
    elif section.hub is not None:
        path = _from_hub(section, key)
    else:
        raise DataError(f"{key}.path=null: give a local {forms} file, {key}.path=FILE")
    one_document = file_form(path) == "txt" and section.txt_rows == "whole"
    remedy = f"use {key}.max_documents=1000" + (f" {key}.txt_rows=lines" if one_document else "")
    check_file(
        path,
        f"{key}.path={section.path or path}",
        forms=forms,
        streamed=section.max_documents is not None and not one_document if streamed is None else streamed,
        remedy=remedy if streamed is None else "give a smaller file",
    )
    # The keys that calibration sections add decide the windows, not the tokens.
    prepared = separate(TextSection, {key: getattr(section, key) for key in TextSection.model_fields}).values
    commit = (
        path.parts[path.parts.index("snapshots") + 1] if section.path is None and "snapshots" in path.parts else None
    )
    digest = dataset_digest(path, f"{key}.path={path}") if os.path.isdir(path) else file_digest(path)
    identity = {"sha256": digest, "format": file_form(path), **prepared}
    return TextFile(key, path, section, identity, commit)


def _from_hub(section: TextSection, key: str) -> Path:
    hub = section.hub
    assert hub is not None
    try:
        return fetch_file(hub.repo, hub.file, hub.revision)
    except Exception as error:
        local = f"a local copy with {key}.path=FILE"
        raise DataError(
            hub_error(f"{key}.hub.repo={hub.repo}", error, local, revision=hub.revision, file=hub.file)
        ) from error


def read_text(text: TextFile) -> str:
    """Return the documents of a file, joined: ``max_documents`` of them after the first ``skip_documents``.

    Raises:
        DataError: a row lacks the text field, JSON or parquet is broken, or there is too much text or none.
    """
    with reading(f"{text.key}.path={text.path}"):
        first, many = text.section.skip_documents, text.section.max_documents
        documents = islice(_documents(text), first, None if many is None else first + many)
        joined = text.section.join.join(documents)
    if re.search("[\ud800-\udfff]", joined):
        raise DataError(
            f"{text.key}.path={text.path}: the text holds half of a character (a lone surrogate); write it as valid "
            "UTF-8"
        )
    if not joined.strip() and first:
        raise DataError(
            f"{text.key}.skip_documents={first}: nothing of {text.path} lies behind so many documents; skip fewer, or "
            f"take shorter ones ({text.key}.txt_rows)"
        )
    if not joined.strip():
        raise DataError(f"{text.key}.path={text.path}: the file holds white space only; give one that holds text")
    return joined


def _documents(text: TextFile) -> Iterator[str]:
    path, field, label = text.path, text.section.text_field, f"{text.key}.path={text.path}"
    if file_form(path) == "txt":
        yield from _txt_documents(path, label, text.section.txt_rows)
        return
    for place, row in rows(path, label, field, f"{text.key}.text_field"):
        yield text_of(row, field, text.key, place, path)


def _txt_documents(path: Path, label: str, txt_rows: str) -> Iterator[str]:
    """Yield the documents of a .txt file.

    Args:
        path: the file.
        label: how messages name it.
        txt_rows: ``whole``: one document; ``lines``: one document a line; ``wikitext``: each line as a row of the hub's
            parquet file, in which a row keeps its newline and a blank line is an empty row.
    """
    if txt_rows == "whole":
        with open_text(path, label) as stream:
            yield stream.read()
        return
    for line in lines(path, label):
        if txt_rows == "wikitext":
            yield f"{line.removesuffix(chr(10))}\n" if line.strip() else ""
        elif line.strip():
            yield line.strip()


def added_before(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer itself adds before a text: BOS for Gemma and LLaMA, none for Qwen and GPT-2."""
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    ids = list(tokenizer("a", verbose=False)["input_ids"])
    starts = range(len(ids) - len(plain) + 1) if plain else ()
    return next((ids[:start] for start in starts if ids[start : start + len(plain)] == plain), [])


def resolve_bos(section: Section, tokenizer: Any) -> Section:
    """Replace ``bos=auto`` by its meaning for this tokenizer; other values stay unchanged.

    It means ``window`` if the tokenizer itself adds one BOS before a text, and ``none`` otherwise. The run identity
    contains the replaced value.
    """
    if section.bos != "auto":
        return section
    adds = added_before(tokenizer) == [_bos_id(tokenizer)]
    return section.model_copy(update={"bos": "window" if adds else "none"})


def lacks_added_tokens(section: TextSection, tokenizer: Any) -> bool:
    """Return whether windows lack the tokens that the tokenizer itself adds before a text; ``bos`` must be resolved."""
    before = added_before(tokenizer)
    return bool(before) and not (section.bos == "window" and before == [_bos_id(tokenizer)])


def _bos_id(tokenizer: Any) -> int | None:
    """Return the id of BOS; if the tokenizer names none, the single token that it adds before a text, or None."""
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    before = added_before(tokenizer)
    return before[0] if len(before) == 1 else None


def tokenise(text: str, tokenizer: Any, bos: str) -> np.ndarray:
    """Tokenise a whole text at once.

    The latest results are cached for tokenizers of model folders (:func:`cfsp.model.tokenizer.load_tokenizer`), because
    the runs of a sweep tokenise the same texts.

    Args:
        text: the text.
        tokenizer: tokenizer of transformers.
        bos: ``start`` adds the tokens that the tokenizer adds by default (LLaMA: one BOS; Qwen: none), as the published
            perplexities do; ``none`` and ``window`` add none here.

    Returns:
        Token ids [n], int64.
    """
    content = getattr(tokenizer, "content_fingerprint", None)
    key = None if content is None else (content, hashlib.sha256(text.encode()).hexdigest(), bos == "start")
    if key is not None and key in _tokenised:
        _tokenised[key] = _tokenised.pop(key)  # moves it to the end, as the latest
        return _tokenised[key]
    ids = _token_ids(text, tokenizer, bos)
    if key is not None and len(ids) <= KEPT_TOKENS:
        ids.setflags(write=False)
        _tokenised[key] = ids
        while len(_tokenised) > KEPT_TEXTS:
            del _tokenised[next(iter(_tokenised))]
    return ids


#: (tokenizer, text, whether BOS is added), both by content -> token ids.
_tokenised: dict[tuple[str, str, bool], np.ndarray] = {}
#: Most texts that are cached, and most tokens of a cached text (8 bytes each).
KEPT_TEXTS, KEPT_TOKENS = 4, 8_000_000


def _token_ids(text: str, tokenizer: Any, bos: str) -> np.ndarray:
    encoded = tokenizer(text, add_special_tokens=bos == "start", return_attention_mask=False, verbose=False)
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def cut_windows(ids: np.ndarray, seq_len: int, *, bos_id: int | None = None) -> np.ndarray:
    """Cut non-overlapping windows from the start; the incomplete tail is dropped, as in the published evaluations.

    Args:
        ids: token ids [n].
        seq_len: tokens of a window.
        bos_id: id that starts each window, before ``seq_len - 1`` tokens of the text; None: windows hold text only.

    Returns:
        Windows [n, seq_len].
    """
    step = seq_len if bos_id is None else seq_len - 1
    count = len(ids) // step
    windows = ids[: count * step].reshape(count, step)
    return windows if bos_id is None else with_bos(windows, bos_id)


def with_bos(windows: np.ndarray, bos_id: int) -> np.ndarray:
    """Return windows [n, T] with BOS before each of them: [n, T + 1]."""
    return np.concatenate([np.full((len(windows), 1), bos_id, dtype=np.int64), windows], axis=1)


def window_bos_id(tokenizer: Any, bos: str, key: str) -> int | None:
    """Return the BOS id if ``bos="window"``; otherwise None.

    Raises:
        DataError: the tokenizer has no BOS token.
    """
    if bos != "window":
        return None
    bos_id = _bos_id(tokenizer)
    if bos_id is None:
        raise DataError(f"{key}.bos=window: the tokenizer has no BOS token; use {key}.bos=none")
    return bos_id
