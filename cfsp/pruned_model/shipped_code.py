"""Recognise the Python files that cfsp writes into model folders, so that no other code is run unasked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfsp.config.components import shown
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.pruned_model.names import PRUNED_PREFIX
from cfsp.system.reading import read_bytes, read_json

#: sha256 of every text that cfsp has shipped, after :func:`family_independent`; DeciLM's file as it is. A changed
#: template gets a new line; the old lines stay, because folders that were written with them exist.
SHIPPED = frozenset(
    {
        # configuration_pruned_*.py
        "35405fca04908b3eba508df8bc440b4425cfdb48774f20f9eef4c4e548af6757",  # since ae27eee
        # modeling_pruned_*.py with per_layer_config
        "44882a1c68290c133d0675b00d753fe91a1a765206e36a4cf4b648e3cea11d0b",  # ae27eee
        "89d90c7f05c3a4d9fbff32d5e8cb61fc343a68491165418b8fb1af13690a24e1",  # 2f5a024
        "09616c3864da4c0fb05db36a4db93a80be0583c406532c24583f1f6200d7dbc8",  # 625daab
        "5390dc9acf767081573f4f60615d8020adca8b0fadbbb073c3bd24b7757d8ae8",  # ca4ec03
        "2af0596830cf9f39a2ffd3ea37b167f3198845b2cd0f7386a384dcf5bc73cd87",  # since e45cd22
        # modeling_pruned_*.py with layer_changes
        "158635cf443ae00ffa53f961c1037a88c58f9792c960f88d5f7f8f4d1e92235d",  # e97ff9b
        "a10797c68783cf041ea8ac0af8d1fcd2b305896b7c2d48c3b59ff7e355547567",  # since fd739ce
        # configuration_decilm.py
        "2662f7e339228bbf0ddaf2dac8c396f3ec6509f57c77f50fec64aad756ec36c2",  # since 3c4d99a
    }
)
_DECILM = "configuration_decilm.py"
_LARGEST_CODE = 1_000_000
_MOST_FILES = 10_000


def check_folder_code(folder: Path) -> bool:
    """Check that all Python code which tools could run for a model folder is code that cfsp ships.

    Tools that are told ``trust_remote_code=True`` run what an ``auto_map`` names, what that imports, and
    ``custom_generate/``; they follow an ``adapter_config.json`` or ``configuration_files`` to other folders. So no
    other ``*.py`` file may lie anywhere in the folder, and every ``auto_map`` names modules of the known files.

    Returns:
        True if the folder brings code; only then a tool needs ``trust_remote_code=True``.

    Raises:
        CheckpointError: the first thing that is not cfsp's own.
    """
    config = read_json(folder / "config.json", f"path={folder}: config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    files = sorted(_files(folder))
    code = [file for file in files if file.suffix.lower() == ".py"]
    shipped = _find_shipped_files(folder, code, str(model_type))
    for file in code:
        if file not in shipped:
            raise _foreign_code_error(folder, f"{file.relative_to(folder)} is not a file as cfsp writes it")
    modules = {file.stem for file in shipped}
    for file in files:
        # transformers takes config.4.0.0.json for config.json where that says so.
        if file.suffix.lower() != ".json" or "config" not in file.name:
            continue
        for reference in _code_references(read_json(file, f"path={folder}: {file.relative_to(folder)}")):
            module, _, name = reference.rpartition(".")
            if module not in modules or not name.isidentifier():
                raise _foreign_code_error(folder, f"{file.relative_to(folder)} names {shown(reference)}")
        if file.name == "adapter_config.json":
            raise _foreign_code_error(folder, f"{file.relative_to(folder)} leads to another model")
    return bool(code)


def family_independent(text: str, names: Mapping[str, str]) -> str:
    """Replace the family's own names in a text by placeholders.

    Two texts without a ``$`` that give the same result are equal, because the placeholders can be filled in again.

    Args:
        text: content of a file that ships with a pruned model.
        names: the family's names (:func:`cfsp.pruned_model.family.family_names`).
    """
    # The line of the norms depends on a trial pass. It can hold nothing but names of attributes.
    text = re.sub(r'(?m)^NORMS = \{("\w+": \[("\w+"(, "\w+")*)?\](, )?)*\}$', "NORMS = ${norms}", text)
    shown = {key: names[key] for key in names if not key.startswith("import_")}
    text = text.replace(names["import_config"], f"from transformers import {names['base_config']}")
    models = f"from transformers import {names['base_causal_lm']}, {names['base_model']}"
    text = text.replace(names["import_models"], models)
    for key, value in sorted(shown.items(), key=lambda item: -len(item[1])):
        text = re.sub(rf"(?<![\w$-]){re.escape(value)}(?![\w-])", f"${{{key}}}", text)
    return text


def is_shipped(text: str, names: Mapping[str, str]) -> bool:
    """Return whether this version of cfsp, or a listed earlier one, ships this text for the family of these names."""
    return "$" not in text and _digest(family_independent(text, names)) in SHIPPED


def _find_shipped_files(folder: Path, code: list[Path], model_type: str) -> set[Path]:
    """Return the files whose name and text are those that cfsp ships for the model type."""
    files = set()
    names: Mapping[str, str] = {}
    if code and model_type.startswith(PRUNED_PREFIX):
        # Start-up time: loads torch.
        from cfsp.pruned_model.family import family_names

        try:
            names = family_names(model_type.removeprefix(PRUNED_PREFIX))
        except UnsupportedModelError:  # then cfsp writes no file for it
            names = {}
    for file in code:
        if file.parent != folder:
            continue
        try:
            text = read_bytes(file, str(file), limit=_LARGEST_CODE).decode()
        except (UnicodeDecodeError, CheckpointError):
            continue
        named_like_family = names and file.stem in (names["configuration_module"], names["modeling_module"])
        if (named_like_family and is_shipped(text, names)) or (file.name == _DECILM and _digest(text) in SHIPPED):
            files.add(file)
    return files


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file below the folder, behind links to folders too."""
    visited: set[str] = set()
    n_entries = 0
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link back to where the walk has been
            folders.clear()
            continue
        visited.add(real)
        n_entries += len(files) + len(folders)
        if n_entries > _MOST_FILES:
            raise CheckpointError(
                f"path={folder}: it holds more than {_MOST_FILES:,} files, so it is no model folder; give one that is"
            )
        yield from (Path(place, name) for name in files)


def _code_references(value: Any) -> Iterator[str]:
    """Yield what a JSON file names as code, at any depth, and the configurations that lie elsewhere."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            for key, inner in part.items():
                if key in ("auto_map", "custom_pipelines"):
                    yield from _iterate_texts(inner)
                elif key == "configuration_files":
                    yield from (text for text in _iterate_texts(inner) if "/" in text or "\\" in text)
                else:
                    pending.append(inner)


def _iterate_texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, and other scalars as JSON."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            pending.extend(part.values())
        elif part is not None:
            yield json.dumps(part)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _foreign_code_error(folder: Path, difference: str) -> CheckpointError:
    return CheckpointError(
        f"path={folder}: {difference}, and the tools would run it; read it and give trust_remote_code=true, or write "
        "the folder again (cfsp export format=hf)"
    )
