"""Source of a model: a packaged folder, a local folder or the hub; checked before a weight is loaded.

Every source becomes a local folder with a fingerprint of its content. So two different models never share a cache
entry or a run, and the same model is recognised in any place.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from cfsp.config.sections import ModelSection, SavedDType
from cfsp.errors import CheckpointError
from cfsp.plan.history import MARKER
from cfsp.system.digest import READERS, file_digest
from cfsp.system.hub import fetch_snapshot
from cfsp.system.hub_errors import hub_error
from cfsp.system.package import package_path
from cfsp.weights.folder_check import check_files, check_no_adapter, layers_of, read_config

#: Files whose content decides how text becomes tokens.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_HUB_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]


@dataclass(frozen=True)
class ModelSource:
    """A model on disk.

    Attributes:
        name: name of the model in records.
        origin: the folder, or ``hub id@commit``.
        folder: the local folder.
        config: content of config.json.
        fingerprint: hash of the content.
        part: whole, or language_model: only the language model of a vision-language model, with another fingerprint.
    """

    name: str
    origin: str
    folder: Path
    config: dict[str, Any] = field(hash=False)  # in the fingerprint
    fingerprint: str
    part: Literal["whole", "language_model"] = "whole"

    @property
    def positions(self) -> int | None:
        """Longest window that the model takes; None where its config.json does not say."""
        stated = self._stated("max_position_embeddings")
        return stated if isinstance(stated, int) and stated > 0 else None

    @property
    def stored_dtype(self) -> str:
        """Dtype that config.json states, else the dtype of most bytes of the weights, else float32."""
        stated = str(self._stated("dtype", "torch_dtype")).removeprefix("torch.")
        return stated if stated in get_args(SavedDType) else self._majority_dtype or "float32"

    @cached_property
    def _majority_dtype(self) -> str | None:
        from cfsp.weights.fit import majority_dtype
        from cfsp.weights.shards import read_header, weight_files

        if not self.folder.is_dir():
            return None
        headers = (read_header(file)[0] for file in weight_files(self.folder))
        return majority_dtype(
            (entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for header in headers
            for entry in header.values()
        )

    @property
    def state(self) -> str | None:
        """State of the weights in a folder that cfsp wrote (pruned, compensated, recovered); None for other folders."""
        try:
            state = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return state if isinstance(state, str) else None

    def _stated(self, *keys: str) -> Any:
        """Return the value of the first key that config.json, or the text model nested in it, has."""
        nested = self.config.get("text_config")
        sections = [self.config, nested] if isinstance(nested, dict) else [self.config]
        return next((section[key] for section in sections for key in keys if section.get(key) is not None), None)


def locate(section: ModelSection, digests: Path | None = None) -> ModelSource:
    """Find the model of a configuration, fetching it from the hub if it is a hub id.

    Args:
        section: the configuration.
        digests: a folder that keeps the digests of large files from one process to the next.

    Raises:
        CheckpointError: the folder is missing, incomplete or truncated, holds no safetensors, or the hub cannot be
            reached.
    """
    source = _located(section, digests)
    if section.part == "whole":
        return source
    return replace(source, part=section.part, fingerprint=f"{source.fingerprint}#{section.part}")


def _located(section: ModelSection, digests: Path | None) -> ModelSource:
    path = str(section.path)
    if path.startswith("pkg://"):
        return _from_folder(section.name, package_path(path), origin=path)
    folder = Path(path).expanduser()
    if folder.exists() or not is_hub_id(path):
        return _from_folder(section.name, folder, origin=str(folder), digests=digests)
    patterns = [*_HUB_SMALL_FILES, "*.safetensors", *(["*.py"] if section.trust_remote_code else [])]
    snapshot = _snapshot(path, section.revision, patterns)
    commit = snapshot.name
    return _from_folder(section.name, snapshot, origin=f"{path}@{commit}", fingerprint=f"hub:{path}@{commit}")


def is_hub_id(path: str) -> bool:
    """Return whether a path that does not exist may be a hub id: NAME or ORGANISATION/NAME."""
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1 and "\\" not in path


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return fetch_snapshot(repo, revision, allow=patterns, ignore=["consolidated*", "original/*"])
    except Exception as error:
        raise CheckpointError(
            hub_error(
                f"model.path={repo}", error, "a local folder, e.g. model=local model.path=FOLDER", revision=revision
            )
        ) from error


def _from_folder(
    name: str, folder: Path, *, origin: str, fingerprint: str | None = None, digests: Path | None = None
) -> ModelSource:
    from cfsp.weights.shards import INDEX, WEIGHTS, check_safetensors

    where = f"model.path={origin}"
    if not folder.is_dir():
        reason = "this is a file" if folder.exists() else "no such folder"
        raise CheckpointError(f"{where}: {reason}; give a model folder or a hub id (organisation/name)")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{where}: the folder is empty; it must hold config.json, *.safetensors and a tokenizer")
    check_no_adapter(folder, where)
    if not (folder / "config.json").is_file() and not _is_special(folder / "config.json"):
        raise CheckpointError(f"{where}: there is no config.json; give the folder that save_pretrained wrote")
    check_files(folder, where)
    config = read_config(folder, where)
    if not any(folder.glob("*.safetensors")):
        pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:2])
        present = f"found {pickles}, which is never loaded" if pickles else "found none"
        raise CheckpointError(f"{where}: *.safetensors weights are needed, {present}; save it with save_pretrained")
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        first = min(path.name for path in folder.glob("*.safetensors"))
        raise CheckpointError(
            f"{where}: found {first}, but neither {WEIGHTS} nor {INDEX}, one of which every tool looks for; "
            "rename the file, or save the model with save_pretrained"
        )
    tensors = check_safetensors(folder)
    layers = layers_of(config)
    if layers is not None and layers[1] > tensors:
        raise CheckpointError(
            f"{where}: config.json says {layers[0]}={layers[1]:,}, the safetensors hold {tensors:,} tensors; they do "
            "not belong together, fetch the model again"
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(f"{where}: its weights are quantised ({method}); give the model before quantisation")
    return ModelSource(name, origin, folder, config, fingerprint or folder_fingerprint(folder, digests))


def _is_special(file: Path) -> bool:
    """Return whether there is something that is neither a file nor a folder."""
    return file.exists() and not file.is_file() and not file.is_dir()


def folder_fingerprint(folder: Path, digests: Path | None = None) -> str:
    """Return the sha256 over weights, config, tokenizer and code; names of files count, names of folders do not.

    The first call for a model reads its files, several at a time; later calls use ``digests`` (:func:`locate`).
    Code in the folder counts too, unless cfsp wrote it, which is then code of this package. The index of a sharded
    checkpoint counts where it differs from the files (:func:`cfsp.weights.shards.index_decides`).
    """
    from cfsp.weights.shards import INDEX, index_decides, read_header, weight_files

    digest = hashlib.sha256()
    index = (folder / INDEX).is_file() and index_decides(
        folder, {file: read_header(file)[0] for file in weight_files(folder)}
    )
    files = [folder / INDEX] if index else []
    files += [*folder.glob("*.safetensors"), folder / "config.json"]
    files += [] if (folder / MARKER).is_file() else folder.glob("*.py")
    files += [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    files.sort()
    with ThreadPoolExecutor(min(READERS, len(files))) as readers:
        for path, content in zip(files, readers.map(partial(file_digest, kept=digests), files), strict=True):
            digest.update(path.name.encode() + b"\0" + content.encode() + b"\0")
    return f"sha256:{digest.hexdigest()}"
