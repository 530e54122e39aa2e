"""Fetch files from the Hugging Face hub, with its local cache as fallback."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from cfsp.errors import CfspError, DataError
from cfsp.system.hub_errors import FULL, hub_error, hub_reason, is_fetching_error, is_offline
from cfsp.system.library_logs import only_to_run_log
from cfsp.system.patient_session import TIMEOUT, HubFailedError, patient_session

log = logging.getLogger(__name__)

_Key = tuple[str, str, str | None, str, str]

#: Seconds for which requests to a failing hub are repeated before the local cache is consulted.
_BRIEF_PATIENCE = 4
#: Errors of a connection that broke within a file.
_WITHIN_A_FILE = ("ReadError", "WriteError", "CloseError")

#: (kind, repository, revision, endpoint, cache folder) -> commit, for the life of the process. A run reads a text more
#: than once, and a branch that moves in between must not change the text.
_commits: dict[_Key, str] = {}


def fetch_snapshot(repo: str, revision: str | None, *, allow: list[str], ignore: list[str]) -> Path:
    """Return the local folder of a model repository; its name is the commit."""
    from huggingface_hub import snapshot_download

    keys = {"allow_patterns": allow, "ignore_patterns": ignore, "etag_timeout": TIMEOUT}
    return _fetch(repo, "model", revision, partial(snapshot_download, repo, **keys))


def fetch_file(repo: str, file: str, revision: str | None) -> Path:
    """Return the local path of one file of a dataset repository."""
    from huggingface_hub import hf_hub_download

    download = partial(hf_hub_download, repo, file, repo_type="dataset", etag_timeout=TIMEOUT)
    return _fetch(repo, "dataset", revision, download)


def files_of(repo: str, snapshot: Path, suffix: str) -> list[str]:
    """Return the names of the files of a model repository at the commit of a snapshot.

    Args:
        repo: id of the repository.
        snapshot: folder that :func:`fetch_snapshot` returned; its files are named where the hub does not answer.
        suffix: end of the names, in small letters.
    """
    from huggingface_hub import HfApi

    reason: Exception | None = None
    try:
        with only_to_run_log(), patient_session():
            names = HfApi().list_repo_files(repo, revision=snapshot.name)
    except Exception as error:  # the hub and the network fail in many ways
        reason = error
        names = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
    files = sorted(name for name in names if name.lower().endswith(suffix))
    if reason is not None and not files and not is_offline(reason):
        raise reason  # without an answer of the hub an empty list would be wrong
    return files


def _fetch(repo: str, kind: str, revision: str | None, download: Callable[..., str]) -> Path:
    """Download at the current commit of ``revision``, or use an earlier download from the cache.

    Requests to a failing hub are repeated for a few seconds before the cache is consulted, and for longer if the cache
    does not hold the files.
    """
    from huggingface_hub import constants

    key = (kind, repo, revision, constants.ENDPOINT, constants.HF_HUB_CACHE)
    reason: Exception | None = None
    for patience in (_BRIEF_PATIENCE, None):
        try:
            with only_to_run_log(), patient_session(patience):
                return _from_hub(key, download)
        except Exception as error:
            if _is_definite(error):
                raise
            reason = error
        try:
            with only_to_run_log():
                path = Path(download(revision=_commits.get(key) or revision, local_files_only=True))
        except Exception as error:  # the error of the hub, caught above, explains more
            if is_offline(reason):
                reason = error
        else:
            if not is_offline(reason):
                _warn_of_cached_copy(repo, path, reason)
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
    path = _download_whole(partial(download, revision=commit, local_files_only=False))
    if commit is not None:
        _commits[key] = commit
        _write_ref(path, revision or "main", commit)
    return path


def _download_whole(download: Callable[..., str], attempts: int = 3) -> Path:
    """Download; repeat if the connection broke within a file and huggingface_hub itself does not repeat it."""
    for _ in range(attempts - 1):
        try:
            return Path(download())
        except Exception as error:
            if not (type(error).__name__ in _WITHIN_A_FILE or "onsistency check failed" in str(error)):
                raise
    return Path(download())


def _write_ref(path: Path, revision: str, commit: str) -> None:
    """Write the commit of a branch or tag into the cache, as huggingface_hub does when it fetches by name.

    Files are fetched by commit, so that all of them belong to the same commit; offline they are looked up by name.
    """
    index = _snapshots_index(path)
    if revision == commit or index is None or ".." in Path(revision).parts:
        return
    ref = Path(*path.parts[:index]) / "refs" / revision
    with suppress(OSError):  # a read-only cache works too
        if not ref.is_file() or ref.read_text(encoding="utf-8") != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            partial_ref = ref.with_name(f".{ref.name}.{os.getpid()}")
            partial_ref.write_text(commit, encoding="utf-8")
            os.replace(partial_ref, ref)


def _snapshots_index(path: Path) -> int | None:
    """Return the index of the folder ``snapshots`` among the parts of a path in the hub's cache; None: no such part."""
    if "snapshots" not in path.parts[:-1]:
        return None
    return len(path.parts) - 1 - path.parts[::-1].index("snapshots")


def _commit_of(path: Path) -> str | None:
    index = _snapshots_index(path)
    return None if index is None else path.parts[index + 1]


def _warn_of_cached_copy(repo: str, path: Path, reason: Exception) -> None:
    why = hub_reason(reason).partition("; ")[0]
    log.warning("%s: %s; the copy in the local cache is taken (commit %s)", repo, why, str(_commit_of(path))[:12])


def _is_definite(error: Exception) -> bool:
    """Return whether repeating and the cache are useless: the hub gave a definite answer, or the disk is full."""
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
    """Repeat requests that fail in passing, and turn the errors that remain into one DataError.

    Args:
        key: ``key=value`` that needs the data, e.g. ``evaluation.zero_shot.tasks=boolq``.
        way_out: local replacement of the data, e.g. ``local tasks with evaluation.zero_shot.include_path=FOLDER``.

    Raises:
        DataError: the data could not be fetched. Errors that do not come from fetching pass unchanged.
    """
    with only_to_run_log(), patient_session():
        try:
            yield
        except CfspError:
            raise
        except Exception as error:
            if not is_fetching_error(error):
                raise
            raise DataError(hub_error(key, error, way_out)) from error
