"""Reader for SentencePiece ``tokenizer.model`` files: pieces and normalisation, from the protobuf wire format.

Only a few fields are needed, so neither the sentencepiece nor the protobuf package becomes a dependency for them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cfsp.errors import CheckpointError

#: trainer_spec.model_type.
UNIGRAM, BPE = 1, 2
#: Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE = 3
_CHARSMAP, _DUMMY_PREFIX = 2, 3
_NORMAL = 1


@dataclass(frozen=True)
class Piece:
    """Piece of a SentencePiece model.

    Attributes:
        text: text of the piece.
        score: score by which pieces are joined.
        kind: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; GGUF uses the same numbers.
    """

    text: str
    score: float
    kind: int


@dataclass
class SentencePieces:
    """Content of a SentencePiece model.

    Attributes:
        pieces: pieces by id.
        algorithm: UNIGRAM, BPE or another number of ``trainer_spec.model_type``.
        charsmap: whether the text is normalised by a table of characters.
        dummy_prefix: whether a space goes before a text.
    """

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = UNIGRAM
    charsmap: bool = False
    dummy_prefix: bool = True


def read_sentencepieces(file: Path) -> SentencePieces:
    """Read a SentencePiece model.

    Raises:
        CheckpointError: the file is not a SentencePiece model.
    """
    model = SentencePieces()
    try:
        for number, value in _fields(file.read_bytes()):
            if number == _PIECES:
                entry = dict(_fields(_bytes(value)))
                model.pieces.append(
                    Piece(
                        _bytes(entry[_PIECE_TEXT]).decode("utf-8"),
                        struct.unpack("<f", _bytes(entry[_PIECE_SCORE]))[0] if _PIECE_SCORE in entry else 0.0,
                        _int(entry.get(_PIECE_KIND, _NORMAL)),
                    )
                )
            elif number == _TRAINER:
                model.algorithm = _int(dict(_fields(_bytes(value))).get(_MODEL_TYPE, UNIGRAM))
            elif number == _NORMALIZER:
                entry = dict(_fields(_bytes(value)))
                model.charsmap = bool(entry.get(_CHARSMAP))
                model.dummy_prefix = bool(entry.get(_DUMMY_PREFIX, 1))
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"{file}: cannot be read as a SentencePiece model ({error!r}); fetch it again") from error
    if not model.pieces:
        raise CheckpointError(f"{file}: holds no pieces; fetch it again")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of each field of a message; a number of fixed size is yielded as its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"ends within a field at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if not byte & 0x80:
            return value, at
        shift += 7


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text belongs")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("text where a number belongs")
    return value
