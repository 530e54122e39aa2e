"""Progress of long work with rate and remaining time: a bar on a terminal, otherwise one log line a minute.

If stderr is not a terminal (the log of a cluster job, a pipe), bars would hide the messages. Then a thread writes one
line every :data:`INTERVAL` seconds while work is going on, also while a single item takes longer than that:
``plan: 3 min; prune in sequence: block 12 of 30, 14.1 s each, 4 min left``.

tqdm draws the bars. It has no line for a log, and none while an item takes long, so these are written here.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Seconds between two lines.
INTERVAL = 55.0


@dataclass
class Work:
    """Work that is going on.

    Attributes:
        label: what is done.
        unit: what is counted; the plural is not formed.
        total: number of items; None: not known.
        done: items that are done.
        started: time at the start, in seconds of the monotonic clock.
    """

    label: str
    unit: str = "it"
    total: int | None = None
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, n: int = 1) -> None:
        """Count ``n`` more items as done."""
        self.done += n

    def line(self, now: float) -> str:
        """Return label, position, rate and time left as a text."""
        seconds = now - self.started
        if self.total is None:
            return f"{self.label}: {duration(seconds)}"
        done = min(self.done, self.total)
        if not done:
            return f"{self.label}: {self.unit} 1 of {self.total}, {duration(seconds)}"
        each = seconds / done
        return (
            f"{self.label}: {self.unit} {min(done + 1, self.total)} of {self.total}, {_rate(each)}, "
            f"{duration(each * (self.total - done))} left"
        )


class _Reporter:
    """Thread that writes a line a minute while there is work, the outer work first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: list[Work] = []
        self._idle = threading.Event()

    def begin(self, work: Work) -> None:
        with self._lock:
            self._works.append(work)
            if len(self._works) == 1:
                self._idle = threading.Event()
                threading.Thread(target=self._write, args=(self._idle,), name="progress", daemon=True).start()

    def end(self, work: Work) -> None:
        with self._lock:
            self._works.remove(work)
            if not self._works:
                self._idle.set()

    def _write(self, idle: threading.Event) -> None:
        while not idle.wait(INTERVAL):
            with self._lock:
                works = list(self._works)
            now = time.monotonic()
            if works:
                log.info("%s", "; ".join(work.line(now) for work in works))


_reporter = _Reporter()


def watched() -> bool:
    """Return whether bars are shown: stderr is a terminal, and tqdm is not disabled."""
    return sys.stderr.isatty() and os.environ.get("TQDM_DISABLE", "0") in ("", "0")


@contextmanager
def working(label: str, total: int | None = None, unit: str = "it") -> Iterator[Work]:
    """Yield a counter of work; the caller advances it, and log lines are written if stderr is not a terminal.

    Args:
        label: what is done.
        total: number of items; None: not known, and the line says only how long it has taken.
        unit: what is counted.
    """
    work = Work(label, unit, total)
    if sys.stderr.isatty():
        yield work
        return
    _reporter.begin(work)
    try:
        yield work
    finally:
        _reporter.end(work)


def progress(items: Collection[T], label: str, unit: str = "it") -> Iterator[T]:
    """Iterate over ``items`` with a progress bar on a terminal, otherwise with log lines."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label, unit=unit, leave=False, total=len(items))
        return
    with working(label, len(items), unit) as work:
        for item in items:
            yield item
            work.advance()


def duration(seconds: float) -> str:
    """Write a duration in the largest unit that keeps it readable: 42 s, 7 min, 2 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _rate(each: float) -> str:
    return f"{each:.1f} s each" if each >= 1 else f"{1 / max(each, 1e-9):,.1f}/s"
