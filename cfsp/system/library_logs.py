"""Redirection of library log messages, such as each attempt of a download, from the console to run.log."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

#: Loggers of the libraries that fetch data.
FETCHING = ("huggingface_hub", "httpx", "httpx2", "httpcore", "datasets", "fsspec", "cfsp.system.patient_session")

#: The latest log records from before run.log was opened.
_early_records: deque[logging.LogRecord] = deque(maxlen=200)


class _ToFiles(logging.Handler):
    """Handler that passes a record on to the log files of the root logger; it keeps the record if there is none yet."""

    def emit(self, record: logging.LogRecord) -> None:
        handlers = logging.getLogger().handlers
        files = [each for each in handlers if isinstance(each, logging.FileHandler) and each.baseFilename != os.devnull]
        for handler in files:
            handler.handle(record)
        if not files:
            _early_records.append(record)


@contextmanager
def only_to_run_log(names: tuple[str, ...] = FETCHING) -> Iterator[None]:
    """Send the records of the loggers ``names`` only to run.log inside the context."""
    original_settings = []
    for name in names:
        logger = logging.getLogger(name)
        if any(isinstance(handler, _ToFiles) for handler in logger.handlers):
            continue  # an outer context has redirected it already
        original_settings.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers, logger.propagate = [_ToFiles()], False
    try:
        yield
    finally:
        for logger, handlers, propagate in original_settings:
            logger.handlers, logger.propagate = handlers, propagate


def write_early_records(handler: logging.Handler) -> None:
    """Write the records kept from before run.log was opened to ``handler``, and drop them."""
    while _early_records:
        handler.handle(_early_records.popleft())
