"""Checks of the files in a model folder, before transformers reads it.

A model folder comes from somebody else. transformers follows links, loads an adapter that lies beside the weights and
builds as many layers as config.json asks for, so links, adapters and absurd sizes are refused here.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError, ConfigError
from cfsp.system.reading import check_regular, read_json, read_text
from cfsp.weights.config_values import check_values

ADAPTER = "adapter_config.json"
#: Largest config.json, tokenizer_config.json and the like; those of published models have below 30 MB.
MAX_CONFIG_BYTES = 40_000_000
#: Most layers and most experts of a layer that a configuration may ask for; published models have 200 and 2,048.
MAX_LAYERS, MAX_EXPERTS = 1_000, 10_000

#: Files that decide what a model computes; links to places outside of the folder are refused.
_DECISIVE = ("*.json", "*.safetensors", "*.model", "*.py", "merges.txt", "vocab.txt")
#: Files that are read or copied beside them; links to places outside are not followed (:func:`leads_outside`).
_COMPANIONS = ("*.jinja", "chat_template*", "README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
#: Small JSON files that transformers reads beside config.json.
_SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
#: JSON files that may be large, and are read by programs that bound what they read.
_LARGE = ("tokenizer.json", "vocab.json", "plan.json", "*.index.json", "vocab*.json")
#: Counts of modules that transformers builds one by one in Python.
_COUNTS = re.compile(r"(layers?|blocks?|experts?|^num_labels)$|^depth$")
#: Of these, experts, and labels of a classifier, for each of which transformers makes an entry.
_EXPERTS = re.compile(r"(experts?|^num_labels)$")


def check_files(folder: Path, where: str) -> None:
    """Refuse FIFOs, devices and links that lead outside where a file of the model is expected.

    Args:
        folder: a model folder, or a snapshot in the cache of the hub.
        where: name of the folder in messages, e.g. ``model.path=FOLDER``.

    Raises:
        CheckpointError: names the file.
    """
    for file in sorted(folder.iterdir()):
        decisive = any(fnmatch(file.name, pattern) for pattern in _DECISIVE)
        if not decisive and not any(fnmatch(file.name, pattern) for pattern in _COMPANIONS):
            continue
        if leads_outside(file, folder):
            if decisive:
                raise CheckpointError(
                    f"{where}: {file.name} is a link to a place outside of the folder; put the file itself there, or "
                    "give the folder where all the files lie"
                )
            continue
        if file.is_dir():
            continue
        label = f"{where}: {file.name}"
        check_regular(file, label)
        if file.suffix == ".json" and not any(fnmatch(file.name, pattern) for pattern in _LARGE):
            size = file.stat().st_size
            if size > MAX_CONFIG_BYTES:
                raise CheckpointError(f"{label}: it has {size:,} bytes; no file of this kind has; fetch it again")
    for name in _SETTINGS:
        if (folder / name).is_file():
            settings = read_json(folder / name, f"{where}: {name}")
            if not isinstance(settings, dict):
                raise CheckpointError(f"{where}: {name} holds no object; fetch the model again")
            if name == "generation_config.json":
                check_values(settings, f"{where}: {name}")


def leads_outside(file: Path, folder: Path) -> bool:
    """Return whether ``file`` is a link to a place outside of ``folder``.

    The cache of the hub is models--ORGANISATION--NAME/{blobs,snapshots/COMMIT}; a snapshot holds links to the blobs,
    and links to the blobs of its own repository do not count.
    """
    if not file.is_symlink():
        return False
    # realpath: of links that lead to themselves resolve() makes a RuntimeError.
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    if target.is_relative_to(home):
        return False
    return not (home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs")


def check_no_adapter(folder: Path, where: str, *, full_weights: bool | None = None) -> None:
    """Refuse a PEFT adapter, alone or beside full weights, which transformers would load on top of them.

    Args:
        folder: a model folder.
        where: name of the folder in messages.
        full_weights: whether there is a model beside the adapter; None: decided by the files in the folder.

    Raises:
        CheckpointError: names the adapter's base and the way out.
    """
    file = folder / ADAPTER
    if not file.is_file() and not file.is_dir():  # links and FIFOs: check_files
        return
    try:
        settings = read_json(file, f"{where}: {ADAPTER}", limit=MAX_CONFIG_BYTES)
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    except CheckpointError:
        base = None
    base_clause = f" of the base model {str(base)[:100]}" if base else ""
    if full_weights is None:
        weights = [path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
        full_weights = bool(weights) and (folder / "config.json").is_file()
    if full_weights:
        raise CheckpointError(
            f"{where}: a PEFT adapter{base_clause} lies beside the full weights ({ADAPTER}), and transformers would "
            f"load it on top of them; merge it (peft: merge_and_unload, then save_pretrained), or move {ADAPTER} away"
        )
    raise CheckpointError(
        f"{where}: this is a PEFT adapter{base_clause}, not a model; load it on its base, merge it (peft: "
        "merge_and_unload, then save_pretrained) and give the folder that this writes"
    )


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Return the config.json of a model folder, after a check of its sizes.

    Raises:
        CheckpointError: it cannot be read, is no object, or asks for more layers than any model has.
    """
    text = read_text(folder / "config.json", f"{where}: config.json", limit=MAX_CONFIG_BYTES)
    try:
        config = json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{where}: config.json is nested too deep; fetch the model again") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: config.json is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: config.json holds no object; fetch the model again")
    check_values(config, f"{where}: config.json")
    for key, count in counts(config):
        limit = MAX_EXPERTS if _EXPERTS.search(key) else MAX_LAYERS
        if count > limit:
            raise CheckpointError(
                f"{where}: config.json asks for {key}={count:,}, more than the {limit:,} that are taken; fetch the "
                "model again"
            )
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(config.get(key), int) and config[key] < 1:
            raise CheckpointError(
                f"{where}: config.json says {key}={config[key]}, and a whole number from 1 is expected; correct it, or "
                "fetch the file again"
            )
    named = config.get("transformers_weights")
    if named is not None:  # transformers would read this file instead of those that were checked
        raise CheckpointError(
            f"{where}: config.json names the weights itself (transformers_weights={str(named)[:100]}); take the key "
            "out and name the files model.safetensors, or as an index does"
        )
    return config


def counts(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the keys and values of a config.json, nested ones included, that count layers, blocks or experts."""
    pending: list[Mapping[str, Any]] = [config]
    while pending:
        for key, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, int | float) and not isinstance(value, bool) and _COUNTS.search(str(key)):
                yield str(key), value


def layers_of(config: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the key and the value that count the blocks in a config.json; the largest where there are several."""
    keys = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return max(((key, n) for key, n in counts(config) if key in keys), key=lambda item: item[1], default=None)


def readable_by_transformers(folder: Path) -> Path:
    """Return ``folder``, or a copy of it without the byte order marks at the start of its JSON files.

    transformers does not read files with such a mark. The copy has links to the large files and is removed when the
    process ends.
    """
    marked = [file for file in folder.glob("*.json") if _has_mark(file)]
    if not marked:
        return folder
    return _without_marks(folder.resolve(), tuple((file.name, file.stat().st_mtime_ns) for file in sorted(marked)))


_COPIES: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _without_marks(folder: Path, marked: tuple[tuple[str, int], ...]) -> Path:
    scratch = tempfile.TemporaryDirectory(prefix="cfsp-model-")
    _COPIES.append(scratch)  # removed at the end of the process
    names = {name for name, _ in marked}
    for file in folder.iterdir():
        if file.name in names:
            (Path(scratch.name) / file.name).write_bytes(without_mark(file.read_bytes()))
        elif file.is_file():
            (Path(scratch.name) / file.name).symlink_to(file.resolve())
    return Path(scratch.name)


def without_mark(content: bytes) -> bytes:
    """Return ``content`` without the byte order mark of UTF-8 at its start."""
    return content.removeprefix(b"\xef\xbb\xbf")


def _has_mark(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(3) == b"\xef\xbb\xbf"


def tokenizer_code(folder: Path) -> bool:
    """Return whether tokenizer_config.json names Python code of its own."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return False
    settings = read_json(file, file.name, error=ConfigError)
    code = settings.get("auto_map") if isinstance(settings, dict) else None
    return bool(code.get("AutoTokenizer")) if isinstance(code, dict) else bool(code)
