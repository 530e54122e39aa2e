"""Writer of pruned models as folders that stock tools load, with a check of the folder before its weights are read.

Equal FFN widths give a plain folder of the stock model type. Unequal widths give a folder that carries its own code
(``remote_code``). A stock model type with other shapes is never written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.reference import place_of
from cfsp.checkpoint.reference_pass import StreamedReference, reference_of
from cfsp.checkpoint.tensor_source import TensorSource, Visit, tensors_of
from cfsp.errors import CheckpointError
from cfsp.plan.history import MARKER, PLAN, PLAN_DIGEST, WEIGHT_DIGESTS, is_written_by_cfsp, plan_digest
from cfsp.pruned_model.family import PRUNED_PREFIX, pruned_family
from cfsp.pruned_model.names import stock_type
from cfsp.system.background_hash import sha256_of
from cfsp.weights.atomic_folder import atomic_folder
from cfsp.weights.folder_check import leads_outside, without_mark
from cfsp.weights.shard_writer import TensorSpec, write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000
#: Smaller files for streamed models: a file that is whole is not written again after a kill.
STREAMED_SHARD_BYTES = 1_000_000_000

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template*",
)
_LICENCE_FILES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class SavedCheckpoint:
    """Checkpoint that was written.

    Attributes:
        folder: the model folder.
        form: "plain" or "remote_code"; the record has a key of this name.
        bytes: size of the safetensors files in bytes.
        dtype: dtype of the weights.
    """

    folder: Path
    form: str
    bytes: int
    dtype: str


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
    state: str = "pruned",
    files: Mapping[str, bytes] | None = None,
    reference: bool = True,
) -> SavedCheckpoint:
    """Write ``model`` to ``folder``, all or nothing; a folder that cfsp wrote earlier is replaced.

    For a streamed model, complete files that a killed process has written are not written again.

    Args:
        model: the model, in memory or streamed.
        folder: folder to write.
        dtype: cast floating-point tensors to it on the way out; the model itself is left as it is.
        source: folder whose tokenizer and licence files are copied.
        state: what happened to the weights: pruned, compensated or recovered.
        files: name -> content of further files (the plan), written together with the rest.
        reference: write what the model computes of fixed tokens, which ``cfsp verify`` compares other tools with.

    Raises:
        CheckpointError: the folder holds other things or cannot be written, or the model's class and
            configuration do not describe its parameters (``cfsp.pruned_model.adopt`` sets both).
        RunError: the model computes values that are not finite.
    """
    check_destination(Path(folder))
    folder = Path(folder).resolve()
    _check_described(model)
    pruned = model.config.model_type.startswith(PRUNED_PREFIX)
    dtype_name = str(dtype or model.dtype).removeprefix("torch.")
    tensors = tensors_of(model)
    key = _scratch_key(dtype_name, source, files) if tensors.reads_blocks and files else None
    with atomic_folder(folder, key) as scratch:
        if source is not None:
            copy_companions(Path(source), scratch)
        # The blocks that are read to be written compute the reference on the way.
        on_the_way = reference and tensors.reads_blocks and not place_of(scratch).is_file()
        streamed_reference = StreamedReference(model, dtype=dtype, tokenizer=scratch) if on_the_way else None
        size = _write_weights(tensors, scratch, dtype, streamed_reference)
        write_json(scratch / "config.json", _config_dict(model, dtype_name))
        if model.generation_config is not None:
            # save_pretrained refuses settings that published models have.
            model.generation_config.to_json_file(scratch / "generation_config.json")
        if pruned:
            for name, text in pruned_family(stock_type(model.config.model_type)).files.items():
                (scratch / name).write_text(text, encoding="utf-8")
        form = "remote_code" if pruned else "plain"
        weights = {file.name: sha256_of(file) for file in sorted(scratch.glob("*.safetensors"))}
        write_json(scratch / MARKER, marker_of(form, dtype_name, state, files, weights))
        for name, content in (files or {}).items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_bytes(content)
        if reference and not place_of(scratch).is_file():
            computed = streamed_reference.result() if streamed_reference is not None else None
            (computed or reference_of(model, dtype=dtype, tokenizer=scratch)).write(place_of(scratch))
    return SavedCheckpoint(folder, form, size, dtype_name)


def marker_of(
    form: str, dtype: str, state: str, files: Mapping[str, bytes] | None, weights: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the content of the marker file, which states to which weights the plan.json among ``files`` belongs.

    Args:
        form: remote_code, plain, padded or decilm.
        dtype: dtype of the weights.
        state: pruned, compensated, recovered or dense.
        files: name -> content of the files beside the weights.
        weights: name -> sha256 of the weight files; None: they are not stated.
    """
    marker: dict[str, Any] = {"schema": 1, "form": form, "dtype": dtype, "state": state}
    plan = (files or {}).get(PLAN)
    if plan is not None:
        marker[PLAN_DIGEST] = plan_digest(plan)
        if weights:
            marker[WEIGHT_DIGESTS] = dict(weights)
    return marker


def check_destination(folder: Path) -> None:
    """Refuse a folder that cfsp did not write, so that nothing of the user's is replaced.

    Raises:
        CheckpointError: names the folder.
    """
    if folder.is_symlink():
        raise CheckpointError(
            f"{folder}: is a symbolic link, whose target would be replaced; remove the link, or give another folder"
        )
    try:
        foreign = folder.exists() and (
            not folder.is_dir() or (any(folder.iterdir()) and not is_written_by_cfsp(folder))
        )
    except OSError as error:
        raise CheckpointError(f"{folder}: the model cannot be saved there ({error})") from error
    if foreign:
        raise CheckpointError(
            f"{folder}: exists and was not written by cfsp (no {MARKER} of its own); choose another folder or empty it"
        )


def _check_described(model: PreTrainedModel) -> None:
    """Rebuild the model from class and configuration, without memory, and compare names and shapes."""
    cls = type(model)
    pruned = model.config.model_type.startswith(PRUNED_PREFIX)
    if not pruned and not cls.__module__.startswith("transformers."):
        raise CheckpointError(f"cannot save a {cls.__name__}: neither a transformers nor a pruned class")
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise CheckpointError(
                f"cannot save this {cls.__name__}: {name} is {actual.get(name, 'absent')}, its configuration "
                f"says {expected.get(name, 'absent')}; the folder would not load"
            )


def _write_weights(tensors: TensorSource, folder: Path, dtype: torch.dtype | None, visit: Visit | None) -> int:
    """Write the weights and return their size in bytes.

    A single tensor at a time is copied (dtype, device, layout) or, of a streamed model, a single block read.
    """
    described = [
        TensorSpec(name, shape, dtype if dtype and kind.is_floating_point else kind)
        for name, shape, kind in tensors.entries()
    ]
    limit = STREAMED_SHARD_BYTES if tensors.reads_blocks else MAX_SHARD_BYTES
    return write_shards(folder, described, lambda names: tensors.values(names, visit), limit)


def _scratch_key(dtype_name: str, source: Path | None, files: Mapping[str, bytes]) -> str:
    """Return a key that is equal for the same checkpoint of a streamed model, whose plan is among ``files``."""
    digest = hashlib.sha256(f"{dtype_name} {source} {MAX_SHARD_BYTES} {STREAMED_SHARD_BYTES}".encode())
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()[:16]


def _config_dict(model: PreTrainedModel, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = dtype
    if config.get("tie_word_embeddings") and _has_own_head(model):  # possible for a model that cfsp did not load
        config["tie_word_embeddings"] = False
    config.pop("auto_map", None)
    if model.config.model_type.startswith(PRUNED_PREFIX):
        config["auto_map"] = pruned_family(stock_type(model.config.model_type)).auto_map
    return config | legacy_rope(config.get("rope_parameters"))


def _has_own_head(model: Any) -> bool:
    """Return whether the head is a parameter of its own in a class that can tie it to the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model._tied_weights_keys:
        return False
    return head.weight is not embedding.weight


def legacy_rope(rope: dict[str, Any] | None) -> dict[str, Any]:
    """Return RoPE in the spelling of transformers 4.

    That version ignores ``rope_parameters`` and silently uses its own theta.
    """
    if not rope:
        return {}
    full = rope.get("full_attention", rope)
    top_level = {"rope_theta", "partial_rotary_factor"}
    scaling = {key: value for key, value in full.items() if key not in top_level}
    legacy = {key: value for key, value in full.items() if key in top_level}
    legacy["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    sliding = rope.get("sliding_attention") or {}
    if sliding.get("rope_theta", full.get("rope_theta")) != full.get("rope_theta"):
        legacy["rope_local_base_freq"] = sliding["rope_theta"]
    return legacy


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that belong to the weights from one model folder to another: tokenizer and licence files."""
    for pattern in (*_TOKENIZER_FILES, *_LICENCE_FILES):
        for file in source.glob(pattern):
            if leads_outside(file, source):
                log.warning("%s: a link to a place outside of the folder; it is not copied", file)
            elif file.is_file() and file.suffix == ".json":  # other tools do not read a byte order mark
                (folder / file.name).write_bytes(without_mark(file.read_bytes()))
            elif file.is_file():
                shutil.copyfile(file, folder / file.name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        # transformers 4 does not know the name that transformers 5 gives this class; both know the old one.
        text = settings.read_text(encoding="utf-8")
        text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        settings.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Serialise in the layout that Hugging Face uses for JSON files."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
