"""Writer for model folders of a stock architecture, whose tensors are read or filled up one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.checkpoint.reference import copy_reference
from cfsp.checkpoint.save import MAX_SHARD_BYTES, check_destination, copy_companions, legacy_rope, marker_of, write_json
from cfsp.errors import CheckpointError
from cfsp.export.card import card_files, facts_of_folder
from cfsp.export.filling import LayerTensor
from cfsp.export.folder import ModelFolder
from cfsp.plan.history import MARKER
from cfsp.weights.atomic_folder import atomic_folder
from cfsp.weights.shard_writer import TensorSpec, write_shards


def write_plain_folder(
    source: ModelFolder,
    to: Path,
    config: Mapping[str, Any],
    tensors: Sequence[LayerTensor],
    *,
    format: str,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes] | None = None,
) -> int:
    """Write the folder ``to``, all or nothing; a folder that cfsp wrote earlier is replaced.

    Args:
        source: the model folder that is exported.
        to: folder to write.
        config: content of config.json.
        tensors: tensors to write.
        format: name of the format, for the marker file and the card.
        dtype: dtype of the tensors; None: as they are stored.
        files: name -> content of further files.

    Returns:
        Bytes of the weights.

    Raises:
        CheckpointError: the folder holds other things or cannot be written, or a value does not fit into ``dtype``.
    """
    check_destination(to)
    to = to.resolve()
    stored = dtype or source.dtype
    name = str(stored).removeprefix("torch.")
    by_name = {tensor.name: tensor for tensor in tensors}

    def values(order: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for tensor_name in order:
            yield tensor_name, _cast(by_name[tensor_name], source, stored)

    with atomic_folder(to) as scratch:
        described = [TensorSpec(tensor.name, tensor.shape, stored) for tensor in tensors]
        size = write_shards(scratch, described, values, MAX_SHARD_BYTES)
        write_json(scratch / "config.json", _config(config, name))
        if (source.folder / "generation_config.json").is_file():
            shutil.copyfile(source.folder / "generation_config.json", scratch / "generation_config.json")
        copy_reference(source.folder, scratch)
        copy_companions(source.folder, scratch)
        for file, content in (files or {}).items():
            (scratch / file).parent.mkdir(exist_ok=True)
            (scratch / file).write_bytes(content)
        state = source.source.state or "dense"
        write_json(scratch / MARKER, marker_of(format, name, state, files))
        for file, content in card_files(facts_of_folder(source.folder), format, to.name).items():
            (scratch / file).write_bytes(content)
    return size


def _cast(tensor: LayerTensor, source: ModelFolder, dtype: torch.dtype) -> Tensor:
    stored = tensor.value(source)
    value = stored.to(dtype)
    if value.isfinite().all():
        return value
    if not stored.isfinite().all():
        raise CheckpointError(
            f"{source.folder}: {tensor.name} holds NaN or infinite values: the folder is damaged; fetch or save the "
            "model again"
        )
    name = str(dtype).removeprefix("torch.")
    raise CheckpointError(f"{tensor.name} does not fit into {name}; use dtype=bfloat16 or float32")


def _config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json for both transformers 4 and 5: RoPE in both spellings, the dtype in one that both take."""
    adapted = {key: value for key, value in config.items() if key != "torch_dtype"}  # it would contradict dtype
    rope = config.get("rope_parameters")
    if rope is None:
        theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
        partial_rotary = {key: config[key] for key in ("partial_rotary_factor",) if config.get(key) is not None}
        scaling = dict(config.get("rope_scaling") or {})
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        if theta or scaling:
            rope = adapted["rope_parameters"] = {"rope_type": kind, **scaling, **theta, **partial_rotary}
    return {**adapted, "dtype": dtype, **legacy_rope(rope)}
