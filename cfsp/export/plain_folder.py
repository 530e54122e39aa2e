"""Writing a model folder of a stock architecture from tensors that are read, or filled up, one by one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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
    form: str,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes] | None = None,
) -> int:
    """Write ``to``, all or nothing; a folder that cfsp wrote earlier is replaced. Returns the bytes of the weights.

    Args:
        config: config.json.
        form: the format's name, for the marker file.
        dtype: of the tensors; None: as they are.
        files: name -> content of further files.

    Raises:
        CheckpointError: the folder holds other things, cannot be written, or a value does not fit into ``dtype``.
    """
    check_destination(to)
    to = to.resolve()
    stored = dtype or source.dtype
    name = str(stored).removeprefix("torch.")
    by_name = {tensor.name: tensor for tensor in tensors}

    def values(order: Sequence[str]) -> Any:
        for asked in order:
            given = by_name[asked].value(source)
            value = given.to(stored)
            if not value.isfinite().all():
                if not given.isfinite().all():
                    raise CheckpointError(
                        f"{source.folder}: {asked} holds NaN or infinite values: the folder is damaged; fetch or save "
                        "the model again"
                    )
                raise CheckpointError(f"{asked} does not fit into {name}; use dtype=bfloat16 or float32")
            yield asked, value

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
        write_json(scratch / MARKER, marker_of(form, name, state, files))
        for file, content in card_files(facts_of_folder(source.folder), form, to.name).items():
            (scratch / file).write_bytes(content)
    return size


def _config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json as both transformers 4 and 5 read it: RoPE in both spellings, the dtype in one that both take."""
    found = {key: value for key, value in config.items() if key != "torch_dtype"}  # else it contradicts
    rope = config.get("rope_parameters")
    if rope is None:
        theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
        part = {key: config[key] for key in ("partial_rotary_factor",) if config.get(key) is not None}
        scaling = dict(config.get("rope_scaling") or {})
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        if theta or scaling:
            rope = found["rope_parameters"] = {"rope_type": kind, **scaling, **theta, **part}
    return {**found, "dtype": dtype, **legacy_rope(rope)}
