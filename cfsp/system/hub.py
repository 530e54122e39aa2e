"""Fetching from the Hugging Face hub: see whether it answers, else use its cache, else say why not and the way out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from cfsp.errors import CfspError, DataError
from cfsp.system.hub_errors import FULL, hub_error, hub_reason, is_fetching_error, is_offline
from cfsp.system.library_logs import off_the_console
from cfsp.system.patient_session import TIMEOUT, HubFailedError, patient_session

log = logging.getLogger(__name__)

_Key = tuple[str, str, str | None, str, str]

#: Seconds of patience with a hub that fails, before and after the local cache has been looked into.
_BRIEF = 4
_WITHIN_A_FILE = ("ReadError", "WriteError", "CloseError")

#: The commit of each (kind, repository, revision, endpoint, cache folder): a run reads a text more than once, and a
#: branch that moves in between must not change it. Kept for the life of the process.
_commits: dict[_Key, str] = {}


def fetch_snapshot(repo: str, revision: str | None, *, allow: list[str], ignore: list[str]) -> Path:
    """Return the folder of a model repository, named after its commit."""
    from huggingface_hub import snapshot_download

    keys = {"allow_patterns": allow, "ignore_patterns": ignore, "etag_timeout": TIMEOUT}
    return _fetched(repo, "model", revision, partial(snapshot_download, repo, **keys))


def fetch_file(repo: str, file: str, revision: str | None) -> Path:
    """Return one file of a dataset repository."""
    from huggingface_hub import hf_hub_download

    download = partial(hf_hub_download, repo, file, repo_type="dataset", etag_timeout=TIMEOUT)
    return _fetched(repo, "dataset", revision, download)


def _fetched(repo: str, kind: str, revision: str | None, download: Callable[..., str]) -> Path:
    """Download at the commit that ``revision`` is at, or find in the cache what was downloaded before.

    A hub that fails is asked for a few seconds before the cache is looked into, and longer where that holds nothing.
    """
    from huggingface_hub import constants

    key = (kind, repo, revision, constants.ENDPOINT, constants.HF_HUB_CACHE)
    reason: Exception | None = None
    for patience in (_BRIEF, None):
        try:
            with off_the_console(), patient_session(patience):
                return _from_hub(key, download)
        except Exception as error:
            if _is_definite(error):
                raise
            reason = error
        try:
            with off_the_console():
                path = Path(download(revision=_commits.get(key) or revision, local_files_only=True))
        except Exception as error:  # the reason above says why the cache was looked into
            if is_offline(reason):
                reason = error
        else:
            if not is_offline(reason):
                _say_cached(repo, path, reason)
            commit = _commit_of(path)
            if commit is not None:
                _commits[key] = commit
            return path
        if not isinstance(reason, HubFailedError):
            break
    assert reason is not None
    raise reason


def _from_hub(key: _Key, download: Callable[..., str]) -> Path:
    from huggingface_hub import HfApi

    kind, repo, revision, *_ = key
    commit = _commits.get(key)
    if commit is None:
        commit = HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT).sha or revision
    path = _whole(partial(download, revision=commit, local_files_only=False))
    if commit is not None:
        _commits[key] = commit
        _write_ref(path, revision or "main", commit)
    return path


def _whole(download: Callable[..., str], attempts: int = 3) -> Path:
    """Download, again where the connection broke within a file in a way that huggingface_hub does not repeat."""
    for _ in range(attempts - 1):
        try:
            return Path(download())
        except Exception as error:
            if not (type(error).__name__ in _WITHIN_A_FILE or "onsistency check failed" in str(error)):
                raise
    return Path(download())


def _write_ref(path: Path, revision: str, commit: str) -> None:
    """Note in the cache which commit a branch or tag is at, as huggingface_hub does when it fetches by that name.

    Files are fetched by the commit, so that all of them are of one, and offline they are looked for by the name.
    """
    at = _snapshots_at(path)
    if revision == commit or at is None or ".." in Path(revision).parts:
        return
    ref = Path(*path.parts[:at]) / "refs" / revision
    with suppress(OSError):  # a cache that may only be read serves as well
        if not ref.is_file() or ref.read_text(encoding="utf-8") != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            partial_ref = ref.with_name(f".{ref.name}.{os.getpid()}")
            partial_ref.write_text(commit, encoding="utf-8")
            os.replace(partial_ref, ref)


def _snapshots_at(path: Path) -> int | None:
    """The place of the folder ``snapshots`` among the parts of a path in the hub's cache."""
    if "snapshots" not in path.parts[:-1]:
        return None
    return len(path.parts) - 1 - path.parts[::-1].index("snapshots")


def _commit_of(path: Path) -> str | None:
    at = _snapshots_at(path)
    return None if at is None else path.parts[at + 1]


def _say_cached(repo: str, path: Path, reason: Exception) -> None:
    why = hub_reason(reason).partition("; ")[0]
    log.warning("%s: %s; the copy in the local cache is taken (commit %s)", repo, why, str(_commit_of(path))[:12])


def _is_definite(error: Exception) -> bool:
    """Whether neither patience nor the cache would help: the hub has answered, or the disk is full."""
    from huggingface_hub.errors import (
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    answers = (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError)
    return isinstance(error, answers) or (isinstance(error, OSError) and error.errno in FULL)


@contextmanager
def fetching(key: str, way_out: str) -> Iterator[None]:
    """Fetch within: libraries' requests are repeated where the hub fails in passing, and what remains is one DataError.

    Args:
        key: key=value that asked for the data, e.g. ``evaluation.zero_shot.tasks=boolq``.
        way_out: local data to give instead, e.g. ``local tasks with evaluation.zero_shot.include_path=FOLDER``.

    Raises:
        DataError: the data could not be fetched. Errors that have nothing to do with fetching pass unchanged.
    """
    with off_the_console(), patient_session():
        try:
            yield
        except CfspError:
            raise
        except Exception as error:
            if not is_fetching_error(error):
                raise
            raise DataError(hub_error(key, error, way_out)) from error
