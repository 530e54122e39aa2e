"""Choice of the GGUF file that a path means, and the facts of it that a record states."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfsp.errors import CheckpointError
from cfsp.weights.gguf_header import GgufHeader, is_gguf

#: Pre-tokenizers that split text as GPT-2 does, or that cfsp sets itself.
_AS_GPT2 = ("gpt-2", "default", "smollm", "gpt2", "mpt", "olmo", "")


@dataclass(frozen=True)
class GgufOrigin:
    """The GGUF file that a model is read from.

    Attributes:
        file: its name.
        quantisation: GGML types of its weights, the one with most parameters first.
        path: its place.
        folders: the folder that holds the model folders made of it.
        notes: what transformers' reader leaves out, as sentences for the user.
    """

    file: str
    quantisation: str
    path: Path = field(compare=False)
    folders: Path = field(compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def facts(self) -> dict[str, str]:
        """Facts for the record."""
        return {"file": self.file, "quantisation": self.quantisation, "weights": "dequantised"}

    @property
    def sentence(self) -> str:
        """A sentence that states the file and that its weights are dequantised."""
        return f"read from {self.file} ({self.quantisation}): the weights are those of the file, dequantised"


def gguf_file_of(path: Path, name: str | None, where: str) -> Path | None:
    """Return the GGUF file that a local path means; None where the path means a folder of safetensors.

    Args:
        path: a file, or a folder.
        name: name of the file in the folder; None: the only one, where the folder has no safetensors.
        where: key and value in messages.

    Raises:
        CheckpointError: the folder has no such file, or several.
    """
    if is_gguf(path):
        if name is not None and name != path.name:
            raise CheckpointError(
                f"{where}: this is a file, and model.gguf_file={name} names another; give one of them"
            )
        return path
    if not path.is_dir():
        return None
    if name is not None:
        file = path / name
        if Path(name).name != name or not file.is_file():
            available = _names_in(path)
            present = f"there {', '.join(available[:5])} can be found" if available else "there are no GGUF files"
            raise CheckpointError(f"model.gguf_file={name}: no such file in {path}; {present}")
        return file
    names = _names_in(path)
    if not names or any(path.glob("*.safetensors")):
        return None
    return path / the_only_one(names, where)


def _names_in(folder: Path) -> list[str]:
    """Return the names of the GGUF files in a folder; FIFOs and folders with such a name are none."""
    return sorted(file.name for file in folder.glob("*.gguf") if file.is_file())


def the_only_one(names: Sequence[str], where: str) -> str:
    """Return the name of the only GGUF file.

    Raises:
        CheckpointError: there are several.
    """
    if len(names) > 1:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(
            f"{where}: holds {len(names)} GGUF files ({', '.join(names[:8])}{more}); name one with model.gguf_file=NAME"
        )
    return names[0]


def unknown_pre_tokenizer(header: GgufHeader) -> str | None:
    """Return the name of a pre-tokenizer that transformers' reader does not know and replaces by GPT-2's."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        GGUF_PRE_TOKENIZER_SPLITS = {}
    name = str(header.metadata.get("tokenizer.ggml.pre", ""))
    byte_level = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    return name if byte_level and name not in (*_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS) else None


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def scratch_folder() -> Path:
    """Return a folder for model folders made of GGUF files, which is removed at the end of the process."""
    if not _SCRATCH:
        _SCRATCH.append(tempfile.TemporaryDirectory(prefix="cfsp-gguf-"))
    return Path(_SCRATCH[0].name)
