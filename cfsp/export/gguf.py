"""A model folder as one GGUF file for llama.cpp, LM Studio, Ollama and the like, written tensor by tensor."""

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
from cfsp.system.leftovers import held
from cfsp.system.progress import progress

if TYPE_CHECKING:
    import gguf

GgufDType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
#: What "auto" is for a folder of that dtype.
_AUTO = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
#: llama.cpp's general.file_type.
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
#: llama.cpp's AVX-512 loops over these take so many values at a time and the rest of a row one by one.
_STEPS = {"f16": 64, "bf16": 64}
#: In the metadata, near the start of the file: it is ours and may be replaced.
_MARKER = "cfsp.version"
_MARKED_WITHIN = 1024
#: Elements that are converted at a time.
_PIECE = 1 << 22


@dataclass(frozen=True)
class _Outgoing:
    """A tensor and what it is stored as: f32, f16, bf16 or q8_0."""

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
    """See from headers and small files alone that :func:`export` can write the model.

    Raises:
        ConfigError: the dtype or the multiple. UnsupportedModelError: llama.cpp cannot hold the model or its
            tokenizer; names the block or the file. CheckpointError: the folder is not whole.
    """
    _prepare(source, dtype, multiple)


def export(source: ModelFolder, to: Path, *, dtype: GgufDType = "auto", multiple: int | None = None) -> Exported:
    """Write ``source`` to the file ``to``, all or nothing; a file that cfsp wrote earlier is replaced.

    Norms and biases stay float32; dtype is that of the matrices ("auto": the folder's own). FFN widths are filled up
    to multiples of ``multiple``: None: those of full speed, 64 in f16 and bf16, else 32; 256 suits files that
    llama-quantize turns into K-quants. The folder's reference goes beside the file.

    Raises:
        CheckpointError: the file exists and is not ours, cannot be written, or the disk is full; a value is too large
            for f16. The others are those of :func:`check`.
    """
    to = Path(to)
    check_file(to)
    layout, vocabulary, stored = _prepare(source, dtype, multiple)
    tensors = [_Outgoing(tensor, _stored_as(tensor, stored)) for tensor in layout.tensors]
    scratch = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch()
        with held(scratch):
            _write(scratch, to.stem, source, layout, vocabulary, tensors, stored)
            copy_reference(source.folder, to)  # a full disk meets it before the file has its name
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
    """Refuse to replace what cfsp did not write, the reference beside the file included.

    Raises:
        CheckpointError: names the file.
    """
    if to.is_dir():
        raise CheckpointError(f"{to}: is a folder; give the file to write, e.g. {to / 'model.gguf'}")
    if to.suffix != ".gguf":  # the reference's place goes by it, and programs on llama.cpp do
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


def _stored_as(tensor: GgufTensor, dtype: str) -> str:
    """llama.cpp wants what has one dimension in f32; q8_0 holds whole chunks of a row."""
    if len(tensor.shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % CHUNK else dtype


def _dtype_notes(tensors: list[_Outgoing], dtype: str) -> tuple[str, ...]:
    other = [one for one in tensors if one.dtype == "f16" and dtype == "q8_0"]
    if not other:
        return ()
    return (
        f"{len(other)} matrices whose rows are no multiple of {CHUNK} are f16, not q8_0, e.g. {other[0].tensor.name}.",
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
    for one in tensors:
        writer.add_tensor_info(one.tensor.name, one.tensor.shape, numpy.dtype("float32"), one.bytes, raw_dtype=one.kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (stream,) = writer.fout
        writer.write_padding(stream, stream.tell())
        # Not write_tensor_data: it takes whole tensors, and on a full disk it does not say so.
        for one in progress(tensors, f"writing {name}", unit="tensor"):
            _write_tensor(stream, source, one)
            writer.write_padding(stream, one.bytes)
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    """What a full disk does not take is tried again on closing, and the file must be closed all the same."""
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


def _write_tensor(stream: Any, source: ModelFolder, one: _Outgoing) -> None:
    """A piece of some rows at a time, so that beside the tensor itself there is only a piece of it in another dtype."""
    tensor = one.tensor.read()
    rows = max(1, _PIECE // max(1, tensor[0].numel()))
    written = 0
    for start in range(0, len(tensor), rows):
        data = _converted(tensor[start : start + rows], one, source)
        stream.write(data.data)
        written += data.nbytes
    assert written == one.bytes


def _converted(piece: Tensor, one: _Outgoing, source: ModelFolder) -> Any:
    """As an array of bytes."""
    import gguf
    import numpy

    if one.dtype == "q8_0":
        quantised = gguf.quantize(piece.float().numpy(), one.kind)
        return numpy.ascontiguousarray(quantised).reshape(-1)
    wanted = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[one.dtype]
    found = piece.to(wanted).contiguous()
    if one.dtype == "f16" and not torch.isfinite(found).all() and torch.isfinite(piece).all():
        raise CheckpointError(
            f"{source.folder}: {one.tensor.name} has values up to {piece.abs().max():.3g}, which f16 cannot hold; use "
            "dtype=bf16 or dtype=f32"
        )
    return found.reshape(-1).view(torch.uint8).numpy()
