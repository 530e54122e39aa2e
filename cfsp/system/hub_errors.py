"""One-line messages for failed requests to the Hugging Face hub: the reason and the way out."""

from __future__ import annotations

import errno
import os
import re
import traceback

from cfsp.system.patient_session import HubFailedError

#: Values of an environment variable that stand for true.
_TRUE = ("1", "ON", "YES", "TRUE")
_OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
#: Error numbers of a full disk.
FULL = {errno.ENOSPC, errno.EDQUOT}
_DISK = FULL | {errno.EACCES, errno.EPERM, errno.EROFS}
#: Base classes of the errors of HTTP clients.
_CONNECTION = ("TransportError", "TimeoutException", "NetworkError", "ProtocolError", "RequestError", "InvalidURL")


def is_offline(error: BaseException | None) -> bool:
    """Return whether huggingface_hub refused a request because it is in offline mode."""
    return type(error).__name__ == "OfflineModeIsEnabled"


def _is_connection_error(error: BaseException) -> bool:
    """Return whether an error is one of the HTTP client's own (httpx, httpx2)."""
    return any(base.__name__ in _CONNECTION for base in type(error).__mro__)


def is_fetching_error(error: BaseException) -> bool:
    """Return whether an error comes from fetching data: from the hub, the network or ``datasets``."""
    if isinstance(error, ConnectionError) or _is_connection_error(error):
        return True
    if type(error).__module__.partition(".")[0] in ("huggingface_hub", "datasets", "fsspec", "httpx", "httpx2"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    fetch = ("load_dataset", "snapshot_download", "hf_hub_download")
    return any(frame.name in fetch for frame in frames) or (isinstance(error, KeyError) and _raised_by_data_set(error))


def _raised_by_data_set(error: BaseException) -> bool:
    """Return whether an error was raised while a split was selected from a data set."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.replace(os.sep, "/").endswith("/datasets/dataset_dict.py")


def hub_error(
    prefix: str, error: BaseException, local: str, *, revision: str | None = None, file: str | None = None
) -> str:
    """Describe a failed request to the hub in one line, with the way out.

    Args:
        prefix: ``key=value`` that names the repository.
        error: error of the request.
        local: local copy that can replace the hub, e.g. ``a local copy with calibration.path=FILE``.
        revision: requested revision; None: the main branch.
        file: requested file; None: the whole repository.
    """
    line = f"{prefix}: {hub_reason(error, revision=revision, file=file)}"
    return f"{line}{',' if '; ' in line else ';'} {'or ' if '; ' in line else ''}give {local}"


def hub_reason(error: BaseException, *, revision: str | None = None, file: str | None = None) -> str:
    """Return a clause with the reason of a failed request, and after a semicolon the remedy if there is one."""
    chain = _chain(error)
    for link in chain:
        reason = _known_reason(link, revision, file)
        if reason is not None:
            return reason
    return f"no local path, and the hub did not give it ({type(error).__name__}: {_short(error)})"


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error, then its causes."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    # The cache is tried last, so an entry that is missing there is not the first cause.
    return sorted(chain, key=lambda link: type(link).__name__ in ("LocalEntryNotFoundError", "IncompleteSnapshotError"))


def _known_reason(error: BaseException, revision: str | None, file: str | None) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    reason: str | None = None
    if isinstance(error, HubFailedError):
        reason = f"{_short(error)}; try again later"
    elif isinstance(error, GatedRepoError):
        reason = _gated_reason(error, status)
    elif isinstance(error, RepositoryNotFoundError):
        reason = "there is no such repository on the hub (or it is private: set HF_TOKEN), and no such local path"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"the repository has no such revision{f' ({revision})' if revision else ''}; see its branches and tags"
    elif isinstance(error, RemoteEntryNotFoundError):
        at = f" at revision {revision}" if revision else ""
        reason = f"the repository has no such file{f' ({file}{at})' if file else ''}; see its list of files"
    elif isinstance(error, DisabledRepoError):
        reason = "the repository has been disabled on the hub"
    elif isinstance(error, HFValidationError):
        reason = "neither a local path nor a name that the hub can have (organisation/name)"
    elif isinstance(error, HfHubHTTPError) and status in (401, 403):
        reason = f"the hub does not accept the token ({status}); set a valid one (HF_TOKEN or `hf auth login`) or none"
    elif isinstance(error, HfHubHTTPError) and status is not None:
        reason = f"no local path, and the hub answered {status} ({_short(error)})"
    elif isinstance(error, LocalEntryNotFoundError) or is_offline(error):
        flag = _offline_flag()
        cause = f"{flag} is set" if flag else "there is no network, or the hub is down"
        way_out = f"; run it once with {flag}=0" if flag else ""
        part = "only in part" if type(error).__name__ == "IncompleteSnapshotError" else "not"
        reason = f"no local path, {part} in the local cache, and the hub cannot be reached ({cause}){way_out}"
    elif isinstance(error, OSError) and _is_disk_error(error):
        reason = _disk_reason(error)
    elif _is_connection_error(error):
        reason = _connection_reason(error)
    elif type(error).__name__ in ("JSONDecodeError", "FileMetadataError") or _is_incomplete_answer(error):
        reason = f"what answers at HF_ENDPOINT={constants.ENDPOINT} is not a hub's ({_short(error)}); see the network"
    else:
        reason = _datasets_reason(error)
    return reason


def _is_incomplete_answer(error: BaseException) -> bool:
    """Return whether huggingface_hub failed on an answer without the fields that every answer of a hub has."""
    frames = traceback.extract_tb(error.__traceback__)
    in_hub = bool(frames) and "huggingface_hub" in frames[-1].filename
    return in_hub and isinstance(error, KeyError | AssertionError | TypeError)


def _gated_reason(error: BaseException, status: int | None) -> str:
    url = str(getattr(getattr(error, "response", None), "url", ""))
    page = re.sub(r"/api/(models/)?", "/", re.split(r"/(?:resolve|tree|revision|raw|paths-info)/", url)[0])
    where = f"its page ({page})" if page.startswith("http") else "the hub"
    token = "use a token of an account that has access" if status == 403 else "set HF_TOKEN (or `hf auth login`)"
    return f"the repository is gated: accept its licence on {where} and {token}"


def _connection_reason(error: BaseException) -> str:
    name, text = type(error).__name__, _short(error)
    if "CERTIFICATE" in text.upper():
        return f"the hub's certificate is not trusted here ({text}); set SSL_CERT_FILE to that of your network"
    if name == "ProxyError":
        return f"the proxy does not let the hub be reached ({text}); see HTTPS_PROXY"
    if name in ("UnsupportedProtocol", "InvalidURL"):
        return f"HF_ENDPOINT={os.environ.get('HF_ENDPOINT')} is no address ({text}); give https://HOST or unset it"
    return f"the connection to the hub broke off ({name}: {text}); try again later"


def _is_disk_error(error: OSError) -> bool:
    from huggingface_hub import constants

    within = bool(error.filename) and str(error.filename).startswith((constants.HF_HOME, constants.HF_HUB_CACHE))
    return error.errno in _DISK or within or "No space left" in str(error)


def _disk_reason(error: OSError) -> str:
    from huggingface_hub import constants

    keys = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HOME")
    values = {key: os.environ[key] for key in keys if os.environ.get(key)}
    place = str(error.filename or "")
    key = next((key for key, folder in values.items() if place.startswith(folder)), "HF_HOME")
    folder = values.get(key, constants.HF_HOME)
    why = error.strerror or "No space left on device"
    return f"{key}={folder} cannot be written ({why}); make room, or set {key} to another folder"


def _offline_flag() -> str | None:
    return next((flag for flag in _OFFLINE_FLAGS if os.environ.get(flag, "").upper() in _TRUE), None)


def _datasets_reason(error: BaseException) -> str | None:
    """Return the reason for an error of ``datasets``, which states causes only in its messages; None: not known."""
    text, flag = _short(error), _offline_flag()
    if "gated dataset" in text:
        from huggingface_hub import constants

        name = re.search(r"Dataset '(.+?)'", text)
        where = f"its page ({constants.ENDPOINT}/datasets/{name[1]})" if name else "the hub"
        return f"the data set is gated: accept its licence on {where} and set HF_TOKEN (or `hf auth login`)"
    if isinstance(error, KeyError) and _raised_by_data_set(error):
        return f"the data set has no split {text}"
    if "offline" in text.lower() or (flag and ("find cache" in text or "reach" in text)):
        cause = f"{flag} is set" if flag else "there is no network, or the hub is down"
        return f"not in the local cache, and the hub cannot be reached ({cause}); fetch it while online"
    unknown = re.search(r"BuilderConfig '?(.+?)'? not found\. Available: (.+)", text)
    if unknown:
        return f"the data set has no configuration {unknown[1]} (it has {unknown[2].strip('[]')[:150]})"
    if type(error).__name__ == "DatasetNotFoundError":
        return f"{text.rstrip('.')} (if it is private: set HF_TOKEN or `hf auth login`)"
    if "Dataset scripts are no longer supported" in text:
        return f"the data set is a loading script, which is never run ({text})"
    if type(error).__name__ in ("DataFilesNotFoundError", "EmptyDatasetError"):
        return f"{text.rstrip('.')}: the repository holds none of the data set's files"
    if isinstance(error, ConnectionError | FileNotFoundError):
        return f"{text.rstrip('.')}; fetch it while online"
    return None


def _short(error: BaseException) -> str:
    """Return a message on one line, without request ids, cut to 200 characters."""
    text = " ".join(str(error).split())
    text = re.sub(r" ?\(Request ID: [^)]*\)| For more information check: \S+", "", text)
    return text if len(text) <= 200 else f"{text[:200]} ..."
