"""One sentence for each way in which the Hugging Face hub can fail to give a file."""

from __future__ import annotations


def hub_error(what: str, error: Exception, local: str) -> str:
    """Say why the hub did not give ``what`` and which ``local`` copy to give instead."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        reason = "the repository is gated: accept its licence on the hub and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "there is no such repository on the hub (or it is private: set HF_TOKEN), and no such local path"
    elif isinstance(error, RevisionNotFoundError):
        reason = "the repository has no such revision"
    else:
        reason = f"it is not a local path, and the hub cannot be reached ({type(error).__name__})"
    return f"{what}: {reason}; or give {local}"
