"""What a model computes of fixed tokens when it is saved, kept in its folder to be compared with what tools make of it.

The file lies in a folder within the model's: tools take every safetensors file at the top for weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cfsp import __version__
from cfsp.errors import CheckpointError
from cfsp.system.atomic import replacing
from cfsp.system.reading import check_regular

if TYPE_CHECKING:
    pass

SCHEMA = "1"
REFERENCE_IN_FOLDER = "verify/reference.safetensors"
#: Beside a GGUF file, in the place of its suffix.
REFERENCE_OF_FILE = ".reference.safetensors"

WINDOWS, LENGTH, SEED = 2, 48, 20240913
_ARRAYS = {"token_ids": "int64", "logprobs": "float32", "top": "int64", "greedy": "int64", "margins": "float32"}


@dataclass(frozen=True)
class Reference:
    """
    token_ids: [n, T] int64.
    logprobs: [n, T-1] fp32, natural logarithm, of the tokens 1..T-1 of each window.
    top: [n, T] int64, the likeliest token after each one.
    greedy: [n, G] int64, the likeliest continuation of each window, token by token.
    margins: [n, G] fp32, by how much each of them is likelier than the second; a tool may choose the other where it is
        smaller than what the tool's arithmetic gives away.
    computed: the dtype that the model computed in (float32; earlier versions: the run's own); stored: the dtype of the
        folder's weights.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top: np.ndarray
    greedy: np.ndarray
    margins: np.ndarray
    computed: str
    stored: str

    def write(self, file: Path) -> None:
        """Atomically."""
        from safetensors.numpy import save_file

        settings = {"schema": SCHEMA, "computed": self.computed, "stored": self.stored, "cfsp": __version__}
        digest = ids_digest(self.token_ids)
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype=kind) for name, kind in _ARRAYS.items()}
        with replacing(file) as partial:
            save_file(arrays, partial, metadata={**settings, "token_ids": digest})


def place_of(path: str | Path) -> Path:
    """Where the reference of a model folder, or of a GGUF file, is kept."""
    path = Path(path)
    return path.with_suffix(REFERENCE_OF_FILE) if path.suffix == ".gguf" else path / REFERENCE_IN_FOLDER


def is_reference(file: Path) -> bool:
    """Whether cfsp wrote the file, as far as its header says."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():  # a FIFO would be waited for
        return False
    try:
        with safe_open(file, framework="numpy") as stream:
            return {"schema", "computed", "cfsp", "token_ids"} <= (stream.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def copy_reference(source: Path, export: Path) -> bool:
    """Give an export (a folder or a GGUF file) the reference of the folder it is made from; False: there is none."""
    file = place_of(source)
    if not file.is_file():
        place_of(export).unlink(missing_ok=True)  # of an earlier export to the same place
        return False
    place = place_of(export)
    with replacing(place) as partial:
        shutil.copyfile(file, partial)
    return True


def read_reference(file: Path) -> Reference:
    """
    Raises:
        CheckpointError: it is missing or damaged, or its tokens are not those that it was computed of.
    """
    from safetensors import SafetensorError, safe_open

    if os.path.lexists(file):  # else the message below
        check_regular(file, str(file))
    try:
        with safe_open(file, framework="numpy") as stream:
            settings = stream.metadata() or {}
            arrays = {name: stream.get_tensor(name) for name in _ARRAYS}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: there is no reference to compare with; a run writes it with the model, so save the model again "
            "with this version of cfsp"
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: the reference cannot be read ({error}); save the model again") from error
    if settings.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{file}: a reference of schema {settings.get('schema')}, this version of cfsp reads {SCHEMA}; save the "
            "model again"
        )
    found = Reference(**arrays, computed=settings.get("computed", ""), stored=settings.get("stored", ""))
    n, length = found.token_ids.shape
    shapes = {"logprobs": (n, length - 1), "top": (n, length), "margins": found.greedy.shape}
    wrong = [name for name, shape in shapes.items() if getattr(found, name).shape != shape]
    if wrong or settings.get("token_ids") != ids_digest(found.token_ids):
        raise CheckpointError(f"{file}: the reference is damaged ({', '.join(wrong) or 'token_ids'}); save it again")
    return found


def ids_digest(token_ids: np.ndarray) -> str:
    """sha256 of the ids [n, T] as little-endian int64."""
    return f"sha256:{hashlib.sha256(np.ascontiguousarray(token_ids, dtype='<i8').tobytes()).hexdigest()}"
