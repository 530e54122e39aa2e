"""Fetching from the Hugging Face hub: first see whether it answers, else use its cache, else say why not."""

from __future__ import annotations

import os
from pathlib import Path

#: Seconds to wait for the hub's first answer; behind a closed firewall one would otherwise wait for minutes.
TIMEOUT = 10


def fetch_snapshot(repo: str, revision: str | None, *, allow: list[str], ignore: list[str]) -> Path:
    """The folder of a model repository, named after its commit."""
    from huggingface_hub import snapshot_download

    revision, cached_only = _look(repo, "model", revision)
    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=allow,
            ignore_patterns=ignore,
            local_files_only=cached_only,
            etag_timeout=TIMEOUT,
        )
    )


def fetch_file(repo: str, file: str, revision: str | None) -> Path:
    """One file of a dataset repository."""
    from huggingface_hub import hf_hub_download

    revision, cached_only = _look(repo, "dataset", revision)
    return Path(
        hf_hub_download(
            repo,
            file,
            repo_type="dataset",
            revision=revision,
            local_files_only=cached_only,
            etag_timeout=TIMEOUT,
        )
    )


def _look(repo: str, repo_type: str, revision: str | None) -> tuple[str | None, bool]:
    """The commit of a revision, and whether only the local cache can be used because the hub does not answer.

    The downloads below retry five times with growing pauses (24 s for nothing where there is no network);
    asked first, the hub fails at once.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # no network, an overloaded hub, offline mode: what was fetched before still serves
        return revision, True
    return info.sha or revision, False


def hub_error(what: str, error: Exception, local: str) -> str:
    """Say why the hub did not give ``what`` and which ``local`` copy to give instead."""
    return f"{what}: {hub_reason(error)}; give {local}"


def hub_reason(error: Exception) -> str:
    """Why the hub did not give something, in a clause."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        reason = "the repository is gated: accept its licence on the hub and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "there is no such repository on the hub (or it is private: set HF_TOKEN), and no such local path"
    elif isinstance(error, RevisionNotFoundError):
        reason = "the repository has no such revision"
    elif isinstance(error, RemoteEntryNotFoundError):
        reason = "the repository has no such file"
    elif isinstance(error, HFValidationError):
        reason = "neither a local path nor a name that the hub can have (organisation/name)"
    elif isinstance(error, LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        cause = "HF_HUB_OFFLINE is set" if offline else "there is no network, or the hub is down"
        reason = f"no local path, not in the local cache, and the hub cannot be reached ({cause})"
    else:
        reason = f"no local path, and the hub did not give it ({type(error).__name__}: {error})"
    return reason
