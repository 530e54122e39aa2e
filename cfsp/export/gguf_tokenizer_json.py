"""Facts of a tokenizer.json that llama.cpp needs: token types, pre-tokenizer, tokens around a text, and scores.

llama.cpp tokenises by itself. Each function here refuses a tokenizer that llama.cpp would not reproduce.

The gguf package writes these facts and does not find them: the pre-tokenizer is recognised in llama.cpp's converter
alone, which is no package, by hashes of known vocabularies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError, UnsupportedModelError

#: GGUF's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: (expressions that text is split by, in order; whether a word that is a token is taken whole) -> llama.cpp's name.
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``; an empty one where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or it does not hold an object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{file}: cannot be read ({reason}); fetch or save the tokenizer again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: does not hold a JSON object; fetch or save the tokenizer again")
    return content


def unsupported_tokenizer(file: Path, feature: str) -> UnsupportedModelError:
    """Return the error for a tokenizer that llama.cpp would not reproduce.

    Args:
        file: the tokenizer's file.
        feature: what is special about it, as a clause without a subject.
    """
    return UnsupportedModelError(
        f"{file}: {feature}, which llama.cpp would not reproduce; GGUF holds byte-level BPE with the pre-tokenizers of "
        "GPT-2, LLaMA 3, Qwen2, SmolLM and Mistral's tekken, and SentencePiece BPE; use another format"
    )


def tokens_and_types(file: Path, content: Mapping[str, Any], *, bytes_fall_back: bool) -> tuple[list[str], list[int]]:
    """Return the text and the GGUF type of each token by id; an id without a token gets an unused one.

    Args:
        file: the tokenizer.json, for messages.
        content: its content.
        bytes_fall_back: whether tokens such as ``<0x0A>`` stand for bytes.

    Raises:
        UnsupportedModelError: two tokens have the same text.
    """
    by_id = {number: (text, NORMAL) for text, number in content["model"]["vocab"].items()}
    if bytes_fall_back:
        by_id |= {n: (text, BYTE) for n, (text, _) in by_id.items() if _BYTE_TOKEN.fullmatch(text)}
    for entry in content.get("added_tokens") or ():
        by_id[entry["id"]] = (entry["content"], CONTROL if entry["special"] else USER_DEFINED)
    unknown = content["model"].get("unk_token")
    by_id |= {n: (text, UNKNOWN) for n, (text, _) in by_id.items() if unknown is not None and text == unknown}
    full = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(max(by_id) + 1)]
    if len({text for text, _ in full}) < len(full):
        raise unsupported_tokenizer(file, "has two tokens of the same text")
    return [text for text, _ in full], [kind for _, kind in full]


def _steps(entry: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Flatten a normalizer, pre-tokenizer or post-processor into the list of its steps, in order."""
    if entry is None:
        return []
    return [step for part in entry[key] for step in _steps(part, key)] if entry["type"] == "Sequence" else [entry]


def pre_tokenizer_name(file: Path, content: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return llama.cpp's name of the pre-tokenizer, and notes for the user.

    Raises:
        UnsupportedModelError: llama.cpp does not know the normalizer or the pre-tokenizer.
    """
    normalizers = [step["type"] for step in _steps(content.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise unsupported_tokenizer(file, f"normalises text by {', '.join(normalizers)}")
    expressions: list[str] = []
    byte_level = False
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            expressions.append(step["pattern"].get("Regex", ""))
        elif kind == "Digits" and step.get("individual_digits"):
            expressions.append("digits")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            byte_level = True
            expressions += [_GPT2] if step.get("use_regex", True) else []
        else:
            expressions.append(f"{kind} {step}")
    whole_words = bool(content["model"].get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((tuple(expressions), whole_words))
    if name is None or not byte_level:
        described = json.dumps(content.get("pre_tokenizer"))
        raise unsupported_tokenizer(
            file, f"has an unknown pre-tokenizer ({described[:200]}, ignore_merges={whole_words})"
        )
    note = "The tokenizer normalises text to NFC, which llama.cpp leaves to its caller."
    return name, (note,) if normalizers else ()


def tokens_around_text(file: Path, content: Mapping[str, Any], special: dict[str, int]) -> tuple[bool, bool]:
    """Return whether BOS goes before a text and whether EOS goes after it.

    The token that the post-processor puts there is written as BOS or EOS, whatever the folder calls so.

    Args:
        file: the tokenizer.json, for messages.
        content: its content.
        special: bos, eos, unk or pad -> id; ids of BOS and EOS are replaced in place.

    Raises:
        UnsupportedModelError: the post-processor is another one, or puts several tokens on one side.
    """
    around: dict[str, list[int]] = {"bos": [], "eos": []}
    for step in _steps(content.get("post_processor"), "processors"):
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise unsupported_tokenizer(file, f"has a {step['type']} post-processor")
        side = "bos"
        for part in step["single"]:
            if "Sequence" in part:
                side = "eos"
            else:
                around[side] += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    for name, numbers in around.items():
        if len(numbers) > 1:
            raise unsupported_tokenizer(
                file, f"puts {len(numbers)} special tokens {'before' if name == 'bos' else 'after'} a text"
            )
        if numbers:
            special[name] = numbers[0]
    return bool(around["bos"]), bool(around["eos"])


def space_prefix(file: Path, content: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a space goes before a text, and notes for the user.

    A tokenizer.json says so either by its normalizer or by its pre-tokenizer.

    Raises:
        UnsupportedModelError: llama.cpp does not know the normalizer or the pre-tokenizer.
    """
    prefix = False
    notes: tuple[str, ...] = ()
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "} or step["content"] != _SPACE:
            raise unsupported_tokenizer(file, f"normalises text by {step['type']}")
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("replacement") != _SPACE or step.get("split", True):
            raise unsupported_tokenizer(file, f"has an unknown pre-tokenizer ({json.dumps(step)[:200]})")
        if step.get("prepend_scheme", "always") != "never":
            prefix = True
            notes = ("llama.cpp puts a space before each text, the tokenizer not before one that begins with a space.",)
    return prefix, notes


def scores_of_merges(file: Path, tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Return scores with which SentencePiece joins the pairs that the merges list, in the same order.

    SentencePiece joins any two pieces whose joined text is a piece, whereas merges join only the pairs that they list.
    Scores exist only where each such pair is listed, and where the pairs that give the same piece follow each other.

    Raises:
        UnsupportedModelError: no scores give the same tokens.
    """
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    listed = set(merges)
    rank: dict[str, int] = {}
    last = ""
    for left, right in merges:
        if left + right != last and left + right in rank:
            raise unsupported_tokenizer(file, f"has merges of '{left + right}' in two places")
        last = left + right
        rank.setdefault(last, len(rank))
    for text in normal:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in normal and pair[1] in normal and pair not in listed:
                raise unsupported_tokenizer(
                    file, f"has no merge of '{pair[0]}' and '{pair[1]}' into its token '{text}'"
                )
    return [float(-rank[text]) if text in rank else 0.0 for text in tokens]
