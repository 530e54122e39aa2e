"""The tokenizer of a model folder as GGUF's metadata: tokens, their types, merges or scores, special tokens.

llama.cpp tokenises by itself, so a vocabulary is only written where its algorithm does the same: byte-level BPE whose
pre-tokenizer has a name there, and SentencePiece BPE as LLaMA has it. Everything else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.export.sentencepiece_file import BPE, SentencePieces, read_sentencepieces

if TYPE_CHECKING:
    import gguf

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
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Vocabulary:
    """kind: GGUF's tokenizer.ggml.model ("gpt2": merges; "llama": scores); the ids of tokens run from 0.

    space_prefix: a space goes before a text (of kind "llama"). notes: sentences for the user.
    """

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    pre: str = "default"
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    space_prefix: bool = False
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Into the metadata of a file that is being written."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.kind == "llama":
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.space_prefix)
        else:
            writer.add_token_merges(list(self.merges))
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer of ``folder``, filled up with unused tokens to config["vocab_size"].

    Raises:
        UnsupportedModelError: a kind of tokenizer that llama.cpp would not reproduce.
        CheckpointError: there is none, or it cannot be read or does not fit the model.
    """
    settings = _settings(folder, config)
    if (folder / "tokenizer.json").is_file():
        found = _from_tokenizer_json(folder / "tokenizer.json", settings)
    elif (folder / "tokenizer.model").is_file():
        found = _from_sentencepieces(folder, settings)
    else:
        raise CheckpointError(f"{folder}: has neither tokenizer.json nor tokenizer.model; save the tokenizer there")
    room = int(config["vocab_size"]) - len(found.tokens)
    if room < 0:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(found.tokens)} tokens, its model {config['vocab_size']}; a GGUF holds "
            "no more than the model has: resize the embedding"
        )
    start = len(found.tokens)
    return Vocabulary(
        **{
            **vars(found),
            "tokens": [*found.tokens, *(f"[PAD{start + n}]" for n in range(room))],
            "types": [*found.types, *[UNUSED] * room],
            "scores": [*found.scores, *[0.0] * room] if found.kind == "llama" else (),
            "chat_template": _chat_template(folder, settings),
        }
    )


# What the folder says beside the tokenizer itself


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); fetch or save the tokenizer again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds no object; fetch or save the tokenizer again")
    return found


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, and the ids of config.json where neither names a token."""
    named = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    ids = {f"{name}_token_id": config.get(f"{name}_token_id") for name in _SPECIAL}
    return {**named, **{key: value[0] if isinstance(value, list) and value else value for key, value in ids.items()}}


def _special(settings: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = tokens.get(text) if isinstance(text, str) else settings.get(f"{name}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[name] = number
    return found


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):  # several, each with a name
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


# tokenizer.json


def _from_tokenizer_json(file: Path, settings: Mapping[str, Any]) -> Vocabulary:
    content = _read_json(file)
    try:
        model = content["model"]
        kind = model.get("type")
        if kind != "BPE":
            raise _unsupported(file, f"is a {kind} tokenizer")
        tokens, types = _tokens(file, content, bytes_fall_back=bool(model.get("byte_fallback")))
        numbers = {text: number for number, text in enumerate(tokens)}
        special = _special(settings, numbers)
        add_bos, add_eos = _added(file, content, special)
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
        shared: dict[str, Any] = {"types": types, "special": special, "add_bos": add_bos, "add_eos": add_eos}
        if model.get("byte_fallback"):
            return _sentencepiece_bpe(file, content, tokens, merges, shared)
        pre, notes = _pre_tokenizer(file, content)
        joined = [" ".join(pair) for pair in merges]
        return Vocabulary("gpt2", tokens, pre=pre, merges=joined, notes=notes, **shared)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file}: is no tokenizer.json that can be read ({error!r}); save it again") from error


def _unsupported(file: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{file}: {what}, which llama.cpp would not reproduce; GGUF holds byte-level BPE with the pre-tokenizers of "
        "GPT-2, LLaMA 3, Qwen2, SmolLM and Mistral's tekken, and SentencePiece BPE; use another format"
    )


def _tokens(file: Path, content: Mapping[str, Any], *, bytes_fall_back: bool) -> tuple[list[str], list[int]]:
    """Texts and types by id; an id that no token has is filled in."""
    by_id = {number: (text, NORMAL) for text, number in content["model"]["vocab"].items()}
    if bytes_fall_back:
        by_id |= {n: (text, BYTE) for n, (text, _) in by_id.items() if _BYTE_TOKEN.fullmatch(text)}
    for entry in content.get("added_tokens") or ():
        by_id[entry["id"]] = (entry["content"], CONTROL if entry["special"] else USER_DEFINED)
    unknown = content["model"].get("unk_token")
    by_id |= {n: (text, UNKNOWN) for n, (text, _) in by_id.items() if unknown is not None and text == unknown}
    full = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(max(by_id) + 1)]
    if len({text for text, _ in full}) < len(full):
        raise _unsupported(file, "has two tokens of the same text")
    return [text for text, _ in full], [kind for _, kind in full]


def _steps(entry: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A normalizer, pre-tokenizer or post-processor as the list of what it does, one after the other."""
    if entry is None:
        return []
    return [step for part in entry[key] for step in _steps(part, key)] if entry["type"] == "Sequence" else [entry]


def _pre_tokenizer(file: Path, content: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name of the pre-tokenizer, and what the user should know."""
    normalizers = [step["type"] for step in _steps(content.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise _unsupported(file, f"normalises text by {', '.join(normalizers)}")
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
        raise _unsupported(file, f"has an unknown pre-tokenizer ({described[:200]}, ignore_merges={whole_words})")
    note = "The tokenizer normalises text to NFC, which llama.cpp leaves to its caller."
    return name, (note,) if normalizers else ()


def _added(file: Path, content: Mapping[str, Any], special: dict[str, int]) -> tuple[bool, bool]:
    """Whether BOS and EOS go around a text. What is put there is BOS or EOS, whatever the folder calls so."""
    around: dict[str, list[int]] = {"bos": [], "eos": []}
    for step in _steps(content.get("post_processor"), "processors"):
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise _unsupported(file, f"has a {step['type']} post-processor")
        side = "bos"
        for part in step["single"]:
            if "Sequence" in part:
                side = "eos"
            else:
                around[side] += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    for name, numbers in around.items():
        if len(numbers) > 1:
            raise _unsupported(
                file, f"puts {len(numbers)} special tokens {'before' if name == 'bos' else 'after'} a text"
            )
        if numbers:
            special[name] = numbers[0]
    return bool(around["bos"]), bool(around["eos"])


# SentencePiece


def _sentencepiece_bpe(
    file: Path, content: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, ...]], shared: dict[str, Any]
) -> Vocabulary:
    prefix, notes = _space_prefix(file, content)
    model = file.with_name("tokenizer.model")
    pieces = read_sentencepieces(model).pieces if model.is_file() else []
    if pieces and len(pieces) <= len(tokens) and all(p.text == t for p, t in zip(pieces, tokens, strict=False)):
        scores = [piece.score for piece in pieces] + [0.0] * (len(tokens) - len(pieces))
    else:
        scores = _scores(file, tokens, shared["types"], merges)
    return Vocabulary("llama", tokens, scores=scores, space_prefix=prefix, notes=notes, **shared)


def _space_prefix(file: Path, content: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a space goes before a text (tokenizer.json has two ways to say so), and what the user should know."""
    prefix = False
    notes: tuple[str, ...] = ()
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "} or step["content"] != _SPACE:
            raise _unsupported(file, f"normalises text by {step['type']}")
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("replacement") != _SPACE or step.get("split", True):
            raise _unsupported(file, f"has an unknown pre-tokenizer ({json.dumps(step)[:200]})")
        if step.get("prepend_scheme", "always") != "never":
            prefix = True
            notes = ("llama.cpp puts a space before each text, the tokenizer not before one that begins with a space.",)
    return prefix, notes


def _scores(file: Path, tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores with which SentencePiece joins what the merges join, in their order.

    SentencePiece joins any two pieces whose text is a piece, merges only the pairs they list: each pair must be listed,
    and those that give one piece must follow each other.
    """
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    listed = set(merges)
    rank: dict[str, int] = {}
    last = ""
    for left, right in merges:
        if left + right != last and left + right in rank:
            raise _unsupported(file, f"has merges of '{left + right}' in two places")
        last = left + right
        rank.setdefault(last, len(rank))
    for text in normal:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in normal and pair[1] in normal and pair not in listed:
                raise _unsupported(file, f"has no merge of '{pair[0]}' and '{pair[1]}' into its token '{text}'")
    return [float(-rank[text]) if text in rank else 0.0 for text in tokens]


def _from_sentencepieces(folder: Path, settings: Mapping[str, Any]) -> Vocabulary:
    file = folder / "tokenizer.model"
    found = read_sentencepieces(file)
    _check_sentencepieces(file, found)
    tokens = [piece.text for piece in found.pieces]
    types = [piece.kind for piece in found.pieces]
    special_texts = {
        token.get("content") if isinstance(token, dict) else token
        for token in (settings.get(f"{name}_token") for name in _SPECIAL)
    }
    for text, number in sorted(_read_json(folder / "added_tokens.json").items(), key=lambda entry: entry[1]):
        if number < len(tokens):
            continue
        if number > len(tokens):
            raise CheckpointError(f"{folder / 'added_tokens.json'}: no token has the id {len(tokens)}; save it again")
        tokens.append(text)
        types.append(CONTROL if text in special_texts else USER_DEFINED)
    numbers = {text: number for number, text in enumerate(tokens)}
    return Vocabulary(
        "llama",
        tokens,
        types,
        _special(settings, numbers),
        add_bos=bool(settings.get("add_bos_token", True)),
        add_eos=bool(settings.get("add_eos_token", False)),
        scores=[piece.score for piece in found.pieces] + [0.0] * (len(tokens) - len(found.pieces)),
        space_prefix=found.dummy_prefix,
    )


def _check_sentencepieces(file: Path, found: SentencePieces) -> None:
    if found.algorithm != BPE:
        raise _unsupported(file, "is no BPE model (a unigram model, or one of words)")
    if found.charsmap:
        raise _unsupported(file, "normalises text by a table of characters")
