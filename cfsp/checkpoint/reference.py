"""Reference of a saved model: what it computes of fixed tokens, kept in its folder for comparison with other tools.

The file lies in a folder within the model's, because tools take every safetensors file at the top for weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cfsp import __version__
from cfsp.errors import CheckpointError
from cfsp.system.atomic import replacing
from cfsp.system.reading import check_regular

SCHEMA = "1"
REFERENCE_IN_FOLDER = "verify/reference.safetensors"
#: Suffix of the reference beside a GGUF file, in place of the file's own.
REFERENCE_OF_FILE = ".reference.safetensors"

WINDOWS, LENGTH, SEED = 2, 48, 20240913
_ARRAYS = {"token_ids": "int64", "logprobs": "float32", "top": "int64", "greedy": "int64", "margins": "float32"}


@dataclass(frozen=True)
class Reference:
    """Log-probabilities and greedy tokens of a model on fixed windows of tokens.

    Attributes:
        token_ids: token ids of the windows, [n, T] int64.
        logprobs: log-probabilities (natural logarithm) of the tokens 1..T-1 of each window, [n, T-1] float32.
        top: likeliest token after each token, [n, T] int64.
        greedy: likeliest continuation of each window, token by token, [n, G] int64.
        margins: difference between the log-probabilities of each greedy token and of the second likeliest one, [n, G]
            float32. A tool may choose the other token where the margin is smaller than the error of its arithmetic.
        computed: dtype in which the model computed: float32, or that of the run in earlier versions.
        stored: dtype of the folder's weights.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top: np.ndarray
    greedy: np.ndarray
    margins: np.ndarray
    computed: str
    stored: str

    def write(self, file: Path) -> None:
        """Write the reference to ``file``, atomically."""
        from safetensors.numpy import save_file

        settings = {"schema": SCHEMA, "computed": self.computed, "stored": self.stored, "cfsp": __version__}
        digest = ids_digest(self.token_ids)
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype=kind) for name, kind in _ARRAYS.items()}
        with replacing(file) as partial:
            save_file(arrays, partial, metadata={**settings, "token_ids": digest})


def place_of(path: str | Path) -> Path:
    """Return the place of the reference of a model folder or of a GGUF file."""
    path = Path(path)
    return path.with_suffix(REFERENCE_OF_FILE) if path.suffix == ".gguf" else path / REFERENCE_IN_FOLDER


def is_reference(file: Path) -> bool:
    """Return whether cfsp wrote the file, as far as its header says."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():  # a FIFO would be waited for
        return False
    try:
        with safe_open(file, framework="numpy") as stream:
            return {"schema", "computed", "cfsp", "token_ids"} <= (stream.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def copy_reference(source: Path, export: Path) -> bool:
    """Copy the reference of a folder to an export of it.

    Args:
        source: model folder that was exported.
        export: the folder or GGUF file.

    Returns:
        Whether the folder has a reference.
    """
    file = place_of(source)
    if not file.is_file():
        place_of(export).unlink(missing_ok=True)  # an earlier export may have left one
        return False
    place = place_of(export)
    with replacing(place) as partial:
        shutil.copyfile(file, partial)
    return True


def read_reference(file: Path) -> Reference:
    """Read a reference.

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
    reference = Reference(**arrays, computed=settings.get("computed", ""), stored=settings.get("stored", ""))
    n, length = reference.token_ids.shape
    shapes = {"logprobs": (n, length - 1), "top": (n, length), "margins": reference.greedy.shape}
    wrong = [name for name, shape in shapes.items() if getattr(reference, name).shape != shape]
    if wrong or settings.get("token_ids") != ids_digest(reference.token_ids):
        raise CheckpointError(f"{file}: the reference is damaged ({', '.join(wrong) or 'token_ids'}); save it again")
    return reference


def ids_digest(token_ids: np.ndarray) -> str:
    """Return the sha256 of token ids [n, T] as little-endian int64."""
    return f"sha256:{hashlib.sha256(np.ascontiguousarray(token_ids, dtype='<i8').tobytes()).hexdigest()}"
