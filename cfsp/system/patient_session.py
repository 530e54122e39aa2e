"""Retries of requests to the Hugging Face hub after short outages, with growing pauses and for a bounded time.

huggingface_hub repeats requests for files but not requests to the API (model_info, lists of files), and it sleeps as
long as a server requests. All requests, also those of ``datasets``, share one session. This module makes the session
repeat every request in the same way and raise one exception at the end, after which no caller repeats the request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

#: Seconds of waiting for an answer at first; twice as long after the first timeout, then three times as long.
TIMEOUT = 10
#: Seconds after the first failure until a request is given up, and the longest pause that a server may ask for.
PATIENCE, LONGEST_PAUSE = 40, 120
#: Patience if nothing listens at the hub's address or its name is unknown: usually the machine has no network.
UNREACHABLE_PATIENCE = 15
#: First and longest pause between two attempts, in seconds.
_FIRST_PAUSE, _LONGEST_OWN_PAUSE = 1.0, 8.0
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
#: Seconds after a request was given up during which later requests are not repeated.
_MEMORY = 120


class HubFailedError(ConnectionError):
    """A request failed repeatedly; the message describes the failure in a clause."""


@dataclass
class _State:
    """State shared by all threads.

    Attributes:
        patience: seconds after its first failure until a request is given up.
        timeout: seconds of waiting for an answer.
        gave_up: time at which a request was given up last; None: no recent one.
        after: patience in seconds of that request.
    """

    patience: float = PATIENCE
    timeout: float = TIMEOUT
    gave_up: float | None = None
    after: float = 0.0


_state = _State()
_lock = threading.RLock()


@contextmanager
def patient_session(patience: float | None = None) -> Iterator[None]:
    """Repeat requests of huggingface_hub that fail in passing, inside the context.

    Args:
        patience: seconds after the first failure of a request until it is given up; None: :data:`PATIENCE`.

    Raises:
        HubFailedError: a request inside the context was given up.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    with _lock:
        before = _state.patience
        _state.patience = PATIENCE if patience is None else patience
        outermost = "send" not in vars(session)
        if outermost:
            session.send = _patient(session.send)  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            _state.patience = before
            if outermost:
                vars(session).pop("send", None)


def forget_outage() -> None:
    """Repeat requests again from now on, although one was given up recently."""
    _state.gave_up, _state.timeout = None, TIMEOUT


def _patient(send: Callable[..., Any]) -> Callable[..., Any]:
    try:
        from huggingface_hub.utils import httpx
    except ImportError:  # older versions of huggingface_hub use httpx itself
        import httpx  # type: ignore[no-redef]
    passing = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)

    def send_patiently(request: Any, **settings: Any) -> Any:
        if not _is_awaited(request, settings):
            return send(request, **settings)
        outage = _Outage()
        while True:
            _set_timeout(request, _state.timeout)
            started = time.monotonic()
            try:
                response = send(request, **settings)
            except passing as error:
                if _is_final(error):
                    raise
                outage.note(_describe_failure(error, time.monotonic() - started), started)
                pause = None
                if isinstance(error, httpx.TimeoutException):  # later requests get more time too
                    _state.timeout = min(_state.timeout + TIMEOUT, 3 * TIMEOUT)
                outage.unreachable = type(error).__name__ == "ConnectError"
            else:
                if response.status_code not in _PASSING_STATUS:
                    _state.gave_up = None
                    return response
                outage.unreachable = False
                outage.note(f"answered {response.status_code} ({response.reason_phrase})", started)
                pause = _requested_pause(response.headers)
                response.close()
            outage.wait(pause, request)

    return send_patiently


def _is_awaited(request: Any, settings: dict[str, Any]) -> bool:
    """Return whether a run needs the answer: an answer of the hub, or a file that the hub stores elsewhere (a stream).

    ``datasets`` sends load counts to Amazon and asks a second server for previews, and the hub's client asks for names
    of agents. They all work without an answer.
    """
    from huggingface_hub import constants

    hub = str(request.url).startswith(f"{constants.ENDPOINT}/") and "/agent-harnesses" not in str(request.url)
    return hub or bool(settings.get("stream"))


class _Outage:
    """Failures of one request, and the pauses between them."""

    def __init__(self) -> None:
        self.failures, self.last, self.began = 0, "", 0.0
        self.next_pause, self.unreachable = _FIRST_PAUSE, False

    def note(self, problem: str, started: float) -> None:
        """Record a failure: its description, and when the attempt started."""
        self.began = self.began if self.failures else started
        self.failures += 1
        self.last = problem

    def wait(self, retry_after: float | None, request: Any) -> None:
        """Sleep before the next attempt.

        Args:
            retry_after: seconds that the server asks to wait; None: it does not say.
            request: the request, for the log.

        Raises:
            HubFailedError: no patience is left.
        """
        now = time.monotonic()
        recently = _state.gave_up is not None and now - _state.gave_up < _MEMORY and _state.after >= _state.patience
        pause = self.next_pause if retry_after is None else max(retry_after, self.next_pause)
        patience = min(_state.patience, UNREACHABLE_PATIENCE) if self.unreachable else _state.patience
        remaining = self.began + (0 if recently else patience) - now
        if retry_after is not None and retry_after > 0 and not recently and _state.patience >= PATIENCE:
            remaining = max(remaining, LONGEST_PAUSE - (now - self.began))
        if pause > remaining:
            if not recently:
                _state.gave_up, _state.after = now, _state.patience
            times = f" ({self.failures} attempts in {now - self.began:.0f} s)" if self.failures > 1 else ""
            later = f", and asks to come back in {retry_after:.0f} s" if retry_after else ""
            raise HubFailedError(f"the hub {self.last}{times}{later}")
        log.info("%s %s: the hub %s; asked again in %.0f s", request.method, request.url, self.last, pause)
        time.sleep(pause)
        self.next_pause = min(2 * self.next_pause, _LONGEST_OWN_PAUSE)


def _set_timeout(request: Any, seconds: float) -> None:
    """Raise the time limits of a request to ``seconds``; a request without a limit gets one."""
    timeouts = dict(request.extensions.get("timeout") or {})
    for kind in ("connect", "read", "write", "pool"):
        timeouts[kind] = max(timeouts.get(kind) or 0, TIMEOUT if kind == "connect" else seconds)
    request.extensions = {**request.extensions, "timeout": timeouts}


def _is_final(error: Exception) -> bool:
    """Return whether another attempt would fail in the same way: the certificate is not trusted."""
    return "CERTIFICATE" in str(error).upper()


def _describe_failure(error: Exception, seconds: float) -> str:
    """Describe an error as the end of a sentence that begins with "the hub"."""
    name = type(error).__name__
    if name == "ConnectError":
        return f"cannot be reached ({error})"
    if "Timeout" in name:
        return f"gave no answer within {seconds:.0f} s"
    return f"broke the connection off ({name}: {error})"


def _requested_pause(headers: Any) -> float | None:
    """Return the seconds that the server asks to wait.

    They are stated by Retry-After (seconds or a date), or by the time until a used-up rate limit is reset.
    """
    import re
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    limit = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit") or "")
    if limit:
        return float(limit[1])
    value = (headers.get("retry-after") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()) if value else None
    except (ValueError, TypeError):
        return None
