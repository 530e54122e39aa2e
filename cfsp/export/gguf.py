"""GGUF export: a model folder as one file for llama.cpp, LM Studio, Ollama and similar, written tensor by tensor."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

import cfsp
from cfsp.checkpoint.reference import copy_reference, is_reference, place_of
from cfsp.errors import CheckpointError, ConfigError
from cfsp.export.folder import ModelFolder
from cfsp.export.gguf_layout import CHUNK, Layout, lay_out, model_config
from cfsp.export.gguf_tensors import GgufTensor
from cfsp.export.gguf_vocabulary import Vocabulary, read_vocabulary
from cfsp.export.result import Exported
from cfsp.system.leftovers import hold_lock
from cfsp.system.progress import progress

if TYPE_CHECKING:
    import gguf

GgufDType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
#: Dtype of a folder -> dtype that "auto" stands for.
_AUTO = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
#: llama.cpp's general.file_type.
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
#: Values that llama.cpp's AVX-512 loops take at a time; they take the rest of a row one by one.
_STEPS = {"f16": 64, "bf16": 64}
#: Key in the metadata, near the start of the file, by which cfsp recognises a file that it may replace.
_MARKER = "cfsp.version"
_MARKED_WITHIN = 1024
#: Elements that are converted at a time.
_PIECE = 1 << 22


@dataclass(frozen=True)
class _Outgoing:
    """Tensor to be written.

    Attributes:
        tensor: name, shape and source of the tensor.
        dtype: dtype in the file: f32, f16, bf16 or q8_0.
    """

    tensor: GgufTensor
    dtype: str

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        import gguf

        return gguf.GGMLQuantizationType[self.dtype.upper()]

    @property
    def bytes(self) -> int:
        import gguf

        elements, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(torch.Size(self.tensor.shape).numel()) // elements * size


def check(source: ModelFolder, dtype: GgufDType = "auto", *, multiple: int | None = None) -> None:
    """Check from headers and small files alone that :func:`export` can write the model.

    Args:
        source: the model folder.
        dtype: dtype of the matrices; "auto": that of the folder.
        multiple: multiple to which FFN widths are filled up; None: as :func:`export` chooses it.

    Raises:
        ConfigError: the dtype or the multiple is not possible.
        UnsupportedModelError: llama.cpp cannot hold the model or its tokenizer; names the block or the file.
        CheckpointError: the folder is not whole.
    """
    _prepare(source, dtype, multiple)


def export(source: ModelFolder, to: Path, *, dtype: GgufDType = "auto", multiple: int | None = None) -> Exported:
    """Write ``source`` to the file ``to``, all or nothing; a file that cfsp wrote earlier is replaced.

    Norms and biases stay float32. The folder's reference is copied to a file beside it.

    Args:
        source: the model folder.
        to: file to write, named ``*.gguf``.
        dtype: dtype of the matrices; "auto": that of the folder.
        multiple: multiple to which FFN widths are filled up. None: the one at which llama.cpp is fastest, 64 for f16
            and bf16, otherwise 32. 256 suits files that llama-quantize turns into K-quants.

    Raises:
        CheckpointError: the file exists and was not written by cfsp, it cannot be written, the disk is full, or a value
            is too large for f16.
        ConfigError: as :func:`check`.
        UnsupportedModelError: as :func:`check`.
    """
    to = Path(to)
    check_file(to)
    layout, vocabulary, stored = _prepare(source, dtype, multiple)
    tensors = [_Outgoing(tensor, _choose_stored_type(tensor, stored)) for tensor in layout.tensors]
    scratch = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch()
        with hold_lock(scratch):
            _write(scratch, to.stem, source, layout, vocabulary, tensors, stored)
            copy_reference(source.folder, to)  # before the rename, so that a full disk leaves the earlier file
            os.replace(scratch, to)
    except OSError as error:
        raise CheckpointError(
            f"{to}: the file cannot be written there ({error.strerror or error}); free some space or give another place"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
    return Exported(
        to,
        "gguf",
        sum(tensor.bytes for tensor in tensors),
        (*layout.notes, *_dtype_notes(tensors, stored), *vocabulary.notes),
    )


def check_file(to: Path) -> None:
    """Refuse to replace a file that cfsp did not write, or such a reference beside it.

    Raises:
        CheckpointError: names the file.
    """
    if to.is_dir():
        raise CheckpointError(f"{to}: is a folder; give the file to write, e.g. {to / 'model.gguf'}")
    if to.suffix != ".gguf":  # the place of the reference depends on the suffix, as do programs on llama.cpp
        raise CheckpointError(f"{to}: a GGUF file is named *.gguf; give {to.with_name(to.name + '.gguf')}")
    reference = place_of(to)
    if reference.exists() and not is_reference(reference):
        raise CheckpointError(
            f"{reference}: exists and was not written by cfsp, and the reference of {to.name} belongs there; give "
            "another file or move it"
        )
    try:
        if to.exists():
            with to.open("rb") as stream:
                if _MARKER.encode() in stream.read(_MARKED_WITHIN):
                    return
            raise CheckpointError(f"{to}: exists and was not written by cfsp; give another file or remove it")
    except OSError as error:
        raise CheckpointError(f"{to}: cannot be read ({error.strerror}); give another file") from error


def _prepare(source: ModelFolder, dtype: GgufDType, multiple: int | None) -> tuple[Layout, Vocabulary, str]:
    if dtype not in get_args(GgufDType):
        raise ConfigError(f"dtype={dtype}: a GGUF file is written in {', '.join(get_args(GgufDType))}")
    if multiple is not None and (multiple < 1 or multiple % CHUNK):
        raise ConfigError(f"multiple={multiple}: format=gguf needs a multiple of {CHUNK}; leave it out")
    config = model_config(source)
    stored = _AUTO[source.dtype] if dtype == "auto" else dtype
    layout = lay_out(source, config, multiple or _STEPS.get(stored, CHUNK))
    return layout, read_vocabulary(source.folder, config), stored


def _choose_stored_type(tensor: GgufTensor, dtype: str) -> str:
    """Return the dtype of a tensor in the file.

    llama.cpp wants tensors of one dimension in f32, and q8_0 holds only rows of whole chunks.
    """
    if len(tensor.shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % CHUNK else dtype


def _dtype_notes(tensors: list[_Outgoing], dtype: str) -> tuple[str, ...]:
    fallen_back = [outgoing for outgoing in tensors if outgoing.dtype == "f16" and dtype == "q8_0"]
    if not fallen_back:
        return ()
    return (
        f"{len(fallen_back)} matrices whose rows are not a multiple of {CHUNK} are f16, not q8_0, e.g. "
        f"{fallen_back[0].tensor.name}.",
    )


def _write(
    file: Path,
    name: str,
    source: ModelFolder,
    layout: Layout,
    vocabulary: Vocabulary,
    tensors: list[_Outgoing],
    dtype: str,
) -> None:
    import gguf
    import numpy

    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.add_string(_MARKER, cfsp.__version__)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in layout.values.items():
        _add(writer, f"{layout.architecture}.{key}", value)
    vocabulary.write(writer)
    for outgoing in tensors:
        writer.add_tensor_info(
            outgoing.tensor.name, outgoing.tensor.shape, numpy.dtype("float32"), outgoing.bytes, raw_dtype=outgoing.kind
        )
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (stream,) = writer.fout
        writer.write_padding(stream, stream.tell())
        # write_tensor_data of gguf takes whole tensors and does not report a full disk.
        for outgoing in progress(tensors, f"writing {name}", unit="tensor"):
            _write_tensor(stream, source, outgoing)
            writer.write_padding(stream, outgoing.bytes)
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    """Close the file even where the disk is full: closing tries again to write the rest, and may fail."""
    for stream in writer.fout or ():
        try:
            stream.close()
        except OSError:
            stream.raw.close()
    writer.fout = None


def _add(writer: gguf.GGUFWriter, key: str, value: int | float | str | list[int]) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _write_tensor(stream: Any, source: ModelFolder, outgoing: _Outgoing) -> None:
    """Write a tensor a few rows at a time, so that only a piece of it is in memory in a second dtype."""
    tensor = outgoing.tensor.read()
    rows = max(1, _PIECE // max(1, tensor[0].numel()))
    written = 0
    for start in range(0, len(tensor), rows):
        data = _convert_tensor(tensor[start : start + rows], outgoing, source)
        stream.write(data.data)
        written += data.nbytes
    assert written == outgoing.bytes


def _convert_tensor(piece: Tensor, outgoing: _Outgoing, source: ModelFolder) -> Any:
    """Return rows of a tensor as bytes in the dtype of the file."""
    import gguf
    import numpy

    if outgoing.dtype == "q8_0":
        quantised = gguf.quantize(piece.float().numpy(), outgoing.kind)
        return numpy.ascontiguousarray(quantised).reshape(-1)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[outgoing.dtype]
    converted = piece.to(dtype).contiguous()
    if outgoing.dtype == "f16" and not torch.isfinite(converted).all() and torch.isfinite(piece).all():
        raise CheckpointError(
            f"{source.folder}: {outgoing.tensor.name} has values up to {piece.abs().max():.3g}, which f16 cannot hold; "
            "use dtype=bf16 or dtype=f32"
        )
    return converted.reshape(-1).view(torch.uint8).numpy()
