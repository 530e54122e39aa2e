"""GGUF metadata of a tokenizer: tokens, their types, merges or scores, and special tokens.

llama.cpp tokenises by itself. A vocabulary is therefore written only where llama.cpp's algorithm gives the same tokens:
byte-level BPE whose pre-tokenizer has a name in llama.cpp, and SentencePiece BPE as LLaMA uses it. Everything else is
refused.

The vocabularies of the gguf package were compared and are not used: ``BpeVocab`` marks the special tokens of a
tokenizer.json as normal ones, ``LlamaHfVocab`` gives every token the score -1000, and ``SentencePieceVocab`` needs the
sentencepiece package. None of them names the pre-tokenizer or refuses a tokenizer that llama.cpp would not reproduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError
from cfsp.export.gguf_tokenizer_json import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer_name,
    read_json_object,
    scores_of_merges,
    space_prefix,
    tokens_and_types,
    tokens_around_text,
    unsupported_tokenizer,
)
from cfsp.export.sentencepiece_file import BPE, SentencePieces, read_sentencepieces

if TYPE_CHECKING:
    import gguf

_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of a GGUF file.

    Attributes:
        kind: GGUF's tokenizer.ggml.model, "gpt2" (with merges) or "llama" (with scores).
        tokens: text of each token; its position is its id.
        types: GGUF's token type of each token.
        special: bos, eos, unk or pad -> id.
        add_bos: whether BOS goes before a text.
        add_eos: whether EOS goes after a text.
        pre: llama.cpp's name of the pre-tokenizer.
        merges: pairs of the kind "gpt2", each joined by a space, in order.
        scores: score of each token of the kind "llama".
        space_prefix: whether a space goes before a text, for the kind "llama".
        chat_template: Jinja template; None where the folder has none.
        notes: sentences for the user.
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
        """Add the vocabulary to the metadata of a file that is being written."""
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
    """Return the tokenizer of ``folder``, filled up with unused tokens to ``config["vocab_size"]``.

    Args:
        folder: model folder with tokenizer.json or tokenizer.model.
        config: config.json of the base architecture.

    Raises:
        UnsupportedModelError: llama.cpp would not reproduce this kind of tokenizer.
        CheckpointError: the tokenizer is missing, cannot be read or does not fit the model.
    """
    settings = _settings(folder, config)
    if (folder / "tokenizer.json").is_file():
        vocabulary = _from_tokenizer_json(folder / "tokenizer.json", settings)
    elif (folder / "tokenizer.model").is_file():
        vocabulary = _from_sentencepieces(folder, settings)
    else:
        raise CheckpointError(f"{folder}: has neither tokenizer.json nor tokenizer.model; save the tokenizer there")
    n_unused = int(config["vocab_size"]) - len(vocabulary.tokens)
    if n_unused < 0:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(vocabulary.tokens)} tokens, its model {config['vocab_size']}; a GGUF "
            "holds no more than the model has: resize the embedding"
        )
    start = len(vocabulary.tokens)
    return Vocabulary(
        **{
            **vars(vocabulary),
            "tokens": [*vocabulary.tokens, *(f"[PAD{start + n}]" for n in range(n_unused))],
            "types": [*vocabulary.types, *[UNUSED] * n_unused],
            "scores": [*vocabulary.scores, *[0.0] * n_unused] if vocabulary.kind == "llama" else (),
            "chat_template": _chat_template(folder, settings),
        }
    )


# Files beside the tokenizer itself


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tokenizer_config.json over special_tokens_map.json, and add the special ids of config.json.

    The ids count only where neither file names the token.
    """
    named = {
        **read_json_object(folder / "special_tokens_map.json"),
        **read_json_object(folder / "tokenizer_config.json"),
    }
    ids = {f"{name}_token_id": config.get(f"{name}_token_id") for name in _SPECIAL}
    return {**named, **{key: value[0] if isinstance(value, list) and value else value for key, value in ids.items()}}


def _special(settings: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, int]:
    ids = {}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = tokens.get(text) if isinstance(text, str) else settings.get(f"{name}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            ids[name] = number
    return ids


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json_object(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


# tokenizer.json


def _from_tokenizer_json(file: Path, settings: Mapping[str, Any]) -> Vocabulary:
    content = read_json_object(file)
    try:
        model = content["model"]
        kind = model.get("type")
        if kind != "BPE":
            raise unsupported_tokenizer(file, f"is a {kind} tokenizer")
        tokens, types = tokens_and_types(file, content, bytes_fall_back=bool(model.get("byte_fallback")))
        numbers = {text: number for number, text in enumerate(tokens)}
        special = _special(settings, numbers)
        add_bos, add_eos = tokens_around_text(file, content, special)
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
        shared: dict[str, Any] = {"types": types, "special": special, "add_bos": add_bos, "add_eos": add_eos}
        if model.get("byte_fallback"):
            return _sentencepiece_bpe(file, content, tokens, merges, shared)
        pre, notes = pre_tokenizer_name(file, content)
        joined = [" ".join(pair) for pair in merges]
        return Vocabulary("gpt2", tokens, pre=pre, merges=joined, notes=notes, **shared)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else "a value of a kind that does not belong there"
        raise CheckpointError(f"{file}: is not a readable tokenizer.json ({missing}); save it again") from error


# SentencePiece


def _sentencepiece_bpe(
    file: Path, content: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, ...]], shared: dict[str, Any]
) -> Vocabulary:
    prefix, notes = space_prefix(file, content)
    model = file.with_name("tokenizer.model")
    pieces = read_sentencepieces(model).pieces if model.is_file() else []
    if pieces and len(pieces) <= len(tokens) and all(p.text == t for p, t in zip(pieces, tokens, strict=False)):
        scores = [piece.score for piece in pieces] + [0.0] * (len(tokens) - len(pieces))
    else:
        scores = scores_of_merges(file, tokens, shared["types"], merges)
    return Vocabulary("llama", tokens, scores=scores, space_prefix=prefix, notes=notes, **shared)


def _from_sentencepieces(folder: Path, settings: Mapping[str, Any]) -> Vocabulary:
    file = folder / "tokenizer.model"
    model = read_sentencepieces(file)
    _check_sentencepieces(file, model)
    tokens = [piece.text for piece in model.pieces]
    types = [piece.kind for piece in model.pieces]
    special_texts = {
        token.get("content") if isinstance(token, dict) else token
        for token in (settings.get(f"{name}_token") for name in _SPECIAL)
    }
    for text, number in sorted(read_json_object(folder / "added_tokens.json").items(), key=lambda entry: entry[1]):
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
        scores=[piece.score for piece in model.pieces] + [0.0] * (len(tokens) - len(model.pieces)),
        space_prefix=model.dummy_prefix,
    )


def _check_sentencepieces(file: Path, model: SentencePieces) -> None:
    if model.algorithm != BPE:
        raise unsupported_tokenizer(file, "is not a BPE model (but a unigram or word model)")
    if model.charsmap:
        raise unsupported_tokenizer(file, "normalises text by a table of characters")
