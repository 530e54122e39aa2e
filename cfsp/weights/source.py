"""Source of a model: a packaged folder, a local folder or the hub; checked before a weight is loaded.

Every source becomes a local folder with a fingerprint of its content. So two different models never share a cache
entry or a run, and the same model is recognised in any place.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from cfsp.config.sections import ModelSection, SavedDType
from cfsp.errors import CheckpointError
from cfsp.plan.history import is_written_by_cfsp, read_marker
from cfsp.system.digest import READERS, file_digest
from cfsp.system.hub import fetch_snapshot, files_of
from cfsp.system.hub_errors import hub_error
from cfsp.system.package import package_path
from cfsp.system.storage import explained
from cfsp.weights import dequantise
from cfsp.weights.dequantise import QuantisedOrigin
from cfsp.weights.fit import majority_dtype
from cfsp.weights.folder_check import check_files, check_no_adapter, layers_of, read_config
from cfsp.weights.gguf_check import check_metadata
from cfsp.weights.gguf_choice import GgufOrigin, gguf_file_of, scratch_folder, the_only_one, unknown_pre_tokenizer
from cfsp.weights.shards import INDEX, WEIGHTS, check_safetensors

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
        gguf: the GGUF file that the model is read from; ``folder`` then has no weights before :func:`with_weights`.
        quantised: the quantised checkpoint that the model is read from; likewise.
    """

    name: str
    origin: str
    folder: Path
    config: dict[str, Any] = field(hash=False)  # in the fingerprint
    fingerprint: str
    part: Literal["whole", "language_model"] = "whole"
    gguf: GgufOrigin | None = None
    quantised: QuantisedOrigin | None = None

    @property
    def hub_id(self) -> str | None:
        """Id of the model on the hub; None for a local model."""
        hub = self.fingerprint.removeprefix("hub:")
        return hub.partition("@")[0] if hub != self.fingerprint else None

    @property
    def public_name(self) -> str:
        """Name of the model without the path that it has on this machine."""
        folder = self.folder if self.quantised is None else self.quantised.path
        local = folder.resolve().name if self.gguf is None else Path(self.gguf.file).stem
        return (self.hub_id or local).rpartition("/")[2]

    @property
    def dequantised(self) -> GgufOrigin | QuantisedOrigin | None:
        """The quantised file or checkpoint that the weights are from; None where they were not quantised."""
        return self.gguf or self.quantised

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
        """State of the weights in a folder that cfsp wrote (pruned, compensated, recovered); None for other folders.

        Raises:
            CheckpointError: the folder's marker is damaged.
        """
        return (read_marker(self.folder) or {}).get("state")

    def _stated(self, *keys: str) -> Any:
        """Return the value of the first key that config.json, or the text model nested in it, has."""
        nested = self.config.get("text_config")
        sections = [self.config, nested] if isinstance(nested, dict) else [self.config]
        return next((section[key] for section in sections for key in keys if section.get(key) is not None), None)


def locate(section: ModelSection, cache: Path | None = None) -> ModelSource:
    """Find the model of a configuration, fetching it from the hub if it is a hub id.

    Args:
        section: the configuration.
        cache: a folder that keeps, from one process to the next, the digests of large files and the model folders
            that GGUF files become; None: neither is kept.

    Raises:
        CheckpointError: the folder is missing, incomplete or truncated, holds no safetensors, or the hub cannot be
            reached.
    """
    source = _located(section, cache)
    if section.part == "whole":
        return source
    return replace(source, part=section.part, fingerprint=f"{source.fingerprint}#{section.part}")


def _located(section: ModelSection, cache: Path | None) -> ModelSource:
    path = str(section.path)
    if path.startswith("pkg://"):
        if section.gguf_file is not None:
            raise CheckpointError(
                f"model.gguf_file={section.gguf_file}: {path} is a folder in the package, which has no GGUF files; "
                "leave it out, or give a folder or file with model=local model.path=PLACE"
            )
        return _from_folder(section.name, package_path(path), origin=path)
    local = Path(path).expanduser()
    if local.exists() or not is_hub_id(path):
        file = gguf_file_of(local, section.gguf_file, f"model.path={path}")
        if file is not None:
            return _from_gguf(section.name, file, origin=str(file), cache=cache)
        return _plain(_from_folder(section.name, local, origin=str(local), digests=_digests(cache)), section, cache)
    if section.gguf_file is not None:
        snapshot = _snapshot(path, section.revision, [section.gguf_file])
        return _from_hub_gguf(section, snapshot, section.gguf_file, cache)
    patterns = [*_HUB_SMALL_FILES, "*.safetensors", *(["*.py"] if section.trust_remote_code else [])]
    snapshot = _snapshot(path, section.revision, patterns)
    commit = snapshot.name
    if not any(snapshot.glob("*.safetensors")):
        names = gguf_files_on_hub(path, snapshot, section.revision)
        if names:
            name = the_only_one(names, f"model.path={path}")
            return _from_hub_gguf(section, _snapshot(path, section.revision, [name]), name, cache)
    source = _from_folder(section.name, snapshot, origin=f"{path}@{commit}", fingerprint=f"hub:{path}@{commit}")
    return _plain(source, section, cache)


def _plain(source: ModelSource, section: ModelSection, cache: Path | None) -> ModelSource:
    """Return the source; that of a quantised checkpoint with the folder that its weights are dequantised to.

    Raises:
        CheckpointError: the checkpoint is quantised, and is not to be dequantised or cannot be.
    """
    from cfsp.weights.dequantise import check, folders_of, write_outline

    where = f"model.path={source.origin}"
    dequantised = check(source.config, source.folder, where, dequantise=section.dequantize)
    if dequantised is None:
        return source
    folders = (scratch_folder() if cache is None else cache / "dequantised") / folders_of(source.fingerprint)
    quantised = replace(dequantised, folders=folders, trust_remote_code=section.trust_remote_code)
    outline = folders / "outline"
    if not (outline / "config.json").is_file():
        write_outline(quantised, outline, where)
    return replace(
        source, folder=outline, config=read_config(outline, where), quantised=quantised,
        fingerprint=f"{source.fingerprint}#dequantised",
    )  # fmt: skip


def _digests(cache: Path | None) -> Path | None:
    return None if cache is None else cache / "digests"


def gguf_files_on_hub(repo: str, snapshot: Path, revision: str | None = None) -> list[str]:
    """Return the GGUF files of a repository; those in the local cache where the hub does not answer."""
    try:
        return files_of(repo, snapshot, ".gguf")
    except Exception as error:
        raise _hub_failed(repo, error, revision) from error


def _from_hub_gguf(section: ModelSection, snapshot: Path, name: str, cache: Path | None) -> ModelSource:
    origin = f"{section.path}@{snapshot.name}"
    file = snapshot / name
    if not file.is_file():
        available = ", ".join(gguf_files_on_hub(str(section.path), snapshot)[:8]) or "none"
        raise CheckpointError(
            f"model.gguf_file={name}: {origin} has no such file; its GGUF files: {available}; see the repository's list"
        )
    return _from_gguf(section.name, file, origin=f"{origin}/{name}", fingerprint=f"hub:{origin}/{name}", cache=cache)


def _from_gguf(
    name: str, file: Path, *, origin: str, cache: Path | None, fingerprint: str | None = None
) -> ModelSource:
    """Return the source of a GGUF file: a folder with its configuration and tokenizer."""
    # Start-up time: loads numpy.
    from cfsp.weights.gguf_header import read_header
    from cfsp.weights.gguf_model import folder_name, unread_settings, write_outline

    where = f"model.path={origin}"
    header = read_header(file, where)
    check_metadata(header, where)
    digest = file_digest(file, _digests(cache))
    folders = (scratch_folder() if cache is None else cache / "gguf") / folder_name(digest)
    outline = folders / "outline"
    if not (outline / "config.json").is_file():
        with explained({} if cache is None else {"paths.cache_dir": cache}):
            write_outline(header, outline, where)
    notes = []
    unread = unread_settings(header)
    if unread:
        notes.append(f"transformers' GGUF reader leaves out {', '.join(unread[:4])}; compare with the original model")
    pre_tokenizer = unknown_pre_tokenizer(header)
    if pre_tokenizer is not None:
        notes.append(
            f"transformers does not know the pre-tokenizer {pre_tokenizer} of the file and splits text as GPT-2 does, "
            "so tokens may differ from the original model's"
        )
    gguf = GgufOrigin(file.name, header.quantisation, file, folders, tuple(notes))
    return ModelSource(
        name, origin, outline, read_config(outline, where), fingerprint or f"gguf:sha256:{digest}", gguf=gguf
    )


def with_weights(source: ModelSource) -> ModelSource:
    """Return the source with a folder that holds the weights; quantised ones are dequantised now.

    Raises:
        CheckpointError: the file cannot be read as a whole, or its weights cannot be written.
    """
    origin = source.dequantised
    if origin is None or source.folder == origin.folders / "model":
        return source
    # Start-up time: loads numpy.
    from cfsp.weights.gguf_header import read_header
    from cfsp.weights.gguf_model import write_weights

    where = f"model.path={source.origin}"
    folder = origin.folders / "model"
    if not (folder / "config.json").is_file():
        if isinstance(origin, QuantisedOrigin):
            dequantise.write_weights(origin, source.folder, folder, where)
        else:
            write_weights(read_header(origin.path, where), source.folder, folder, where)
    return replace(source, folder=folder, config=read_config(folder, where))


def is_hub_id(path: str) -> bool:
    """Return whether a path that does not exist may be a hub id: NAME or ORGANISATION/NAME."""
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1 and "\\" not in path


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return fetch_snapshot(repo, revision, allow=patterns, ignore=["consolidated*", "original/*"])
    except Exception as error:
        raise _hub_failed(repo, error, revision) from error


def _hub_failed(repo: str, error: Exception, revision: str | None) -> CheckpointError:
    way_out = "a local folder, e.g. model=local model.path=FOLDER"
    return CheckpointError(hub_error(f"model.path={repo}", error, way_out, revision=revision))


def _from_folder(
    name: str, folder: Path, *, origin: str, fingerprint: str | None = None, digests: Path | None = None
) -> ModelSource:

    where = f"model.path={origin}"
    if not folder.is_dir():
        kind = "this is a file" if folder.is_file() else "neither a folder nor a regular file"
        reason = kind if folder.exists() else "no such folder"
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
    files += [] if is_written_by_cfsp(folder) else folder.glob("*.py")
    files += [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    files.sort()
    with ThreadPoolExecutor(min(READERS, len(files))) as readers:
        for path, content in zip(files, readers.map(partial(file_digest, kept=digests), files), strict=True):
            digest.update(path.name.encode() + b"\0" + content.encode() + b"\0")
    return f"sha256:{digest.hexdigest()}"
