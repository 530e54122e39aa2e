"""Log lines of libraries that belong into run.log and not on the console, such as each attempt of a download."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

#: Loggers of the libraries that fetch data.
FETCHING = ("huggingface_hub", "httpx", "httpx2", "httpcore", "datasets", "fsspec", "cfsp.system.patient_session")

#: The latest log records from before run.log was opened.
_waiting: deque[logging.LogRecord] = deque(maxlen=200)


class _ToFiles(logging.Handler):
    """Handler that passes a record on to the log files of the root logger; it keeps the record if there is none yet."""

    def emit(self, record: logging.LogRecord) -> None:
        handlers = logging.getLogger().handlers
        files = [each for each in handlers if isinstance(each, logging.FileHandler) and each.baseFilename != os.devnull]
        for handler in files:
            handler.handle(record)
        if not files:
            _waiting.append(record)


@contextmanager
def off_the_console(names: tuple[str, ...] = FETCHING) -> Iterator[None]:
    """Send the records of the loggers ``names`` only to run.log inside the context."""
    before = []
    for name in names:
        logger = logging.getLogger(name)
        if any(isinstance(handler, _ToFiles) for handler in logger.handlers):
            continue  # an outer context has redirected it already
        before.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers, logger.propagate = [_ToFiles()], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


def write_waiting(handler: logging.Handler) -> None:
    """Write the records from before the log file was opened to ``handler``, and forget them."""
    while _waiting:
        handler.handle(_waiting.popleft())
