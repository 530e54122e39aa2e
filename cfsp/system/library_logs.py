"""Log lines of libraries that belong in run.log and not on the console, such as each attempt of a download."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

#: Loggers of fetching.
FETCHING = ("huggingface_hub", "httpx", "httpx2", "httpcore", "datasets", "fsspec", "cfsp.system.patient_session")

#: Records from before there was a run.log to write them to; the latest ones.
_waiting: deque[logging.LogRecord] = deque(maxlen=200)


class _ToFiles(logging.Handler):
    """Pass a record on to the log files of the root logger; keep it where there is none yet."""

    def emit(self, record: logging.LogRecord) -> None:
        handlers = logging.getLogger().handlers
        files = [at for at in handlers if isinstance(at, logging.FileHandler) and at.baseFilename != os.devnull]
        for handler in files:
            handler.handle(record)
        if not files:
            _waiting.append(record)


@contextmanager
def off_the_console(names: tuple[str, ...] = FETCHING) -> Iterator[None]:
    """Send what the loggers of ``names`` say to run.log alone, as long as the context is entered."""
    before = []
    for name in names:
        logger = logging.getLogger(name)
        if any(isinstance(handler, _ToFiles) for handler in logger.handlers):
            continue  # entered before
        before.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers, logger.propagate = [_ToFiles()], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


def write_waiting(handler: logging.Handler) -> None:
    """Write the records that came before there was a log file, and forget them."""
    while _waiting:
        handler.handle(_waiting.popleft())
