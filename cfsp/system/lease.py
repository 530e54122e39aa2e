"""One piece of work, one worker: an OS lock among the processes of a machine, a heartbeat among machines.

On one machine a lock ends with its process, however that ends, so what a killed process held is free at once. Machines
that share a file system may not share locks: there a lease file says who works, its holder touches it every few
seconds, and who has not for :data:`STALE` seconds has lost it. Clocks are never compared: how old a heartbeat is, is
told by the file system that keeps it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cfsp.system.atomic import naming

log = logging.getLogger(__name__)

#: Seconds between two heartbeats, and without any after which a lease of another machine is over.
BEAT, STALE = 5.0, 60.0


class Lease:
    """Exclusive use of what ``path`` stands for, until :meth:`release` or the end of the process."""

    def __init__(self, path: Path, lock: int, token: str) -> None:
        self.path, self._lock, self._token = path, lock, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lease of {path.name}")
        self._thread.start()

    def release(self) -> None:
        """Give it back; others may take it from now on."""
        self._stop.set()
        self._thread.join()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)
        _lock_file(self.path).unlink(missing_ok=True)  # while it is locked: see _lock
        os.close(self._lock)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            if _read(self.path).get("token", self._token) != self._token:
                log.warning("%s: this process was away for too long, another has it now", self.path.name)
                return
            with suppress(OSError):
                os.utime(self.path)


def take(path: Path) -> Lease | None:
    """The lease at ``path`` (its folder is made), or None while another process has it. Never waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(_lock_file(path))
    if lock is None:
        return None
    token = uuid.uuid4().hex
    claimed = False
    try:
        with naming(path):
            claimed = _claim(path, token)
    except OSError:
        _lock_file(path).unlink(missing_ok=True)  # while it is locked
        raise
    finally:
        if not claimed:
            os.close(lock)
    return Lease(path, lock, token) if claimed else None


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _lock(path: Path) -> int | None:
    """Lock the file at ``path`` until what this returns is closed; None while another process has it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            return lock  # a file system without locks: the heartbeat alone decides
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # its holder removed it between our two steps; others lock the file that came after it


def holder(path: Path) -> str | None:
    """Who has the lease now, as ``process N on HOST``; None where it is free."""
    found = _read(path)
    if not found:
        return None
    if found.get("machine") == _machine():
        alive = _is_locked(path)
    else:
        alive = not _is_stale(path)
    return f"process {found.get('process')} on {found.get('host')}" if alive else None


@contextmanager
def waited(path: Path, announce: Callable[[str], object], every: float = 0.2) -> Iterator[None]:
    """Hold the lease inside, however long it takes to get it; ``announce`` is told whom this waits for, once."""
    lease, told = take(path), False
    while lease is None:
        if not told:
            announce(holder(path) or "another process")
            told = True
        time.sleep(every)
        lease = take(path)
    try:
        yield
    finally:
        lease.release()


def _claim(path: Path, token: str) -> bool:
    """Write the lease file as the only one who does; the caller has the machine's lock, if there are any."""
    mine = path.with_name(f".{path.name}.{token}")
    values = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "token": token}
    try:
        mine.write_text(json.dumps(values), encoding="utf-8")
        for _ in range(2):
            with suppress(FileExistsError):
                os.link(mine, path)  # fails where there is one, on a shared file system too
                return True
            found = _read(path)
            if found.get("machine") != _machine() and not _is_stale(path):
                return False
            _set_aside(path, found.get("token"), token)
        return False
    finally:
        mine.unlink(missing_ok=True)


def _set_aside(path: Path, over: str | None, token: str) -> None:
    """Remove the lease that is over; another that came in its place meanwhile is put back."""
    aside = path.with_name(f".{path.name}.{token}.over")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside).get("token") != over:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > STALE
    except FileNotFoundError:
        return True
    finally:
        probe.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(_lock_file(path), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return not _is_stale(path)
    finally:
        os.close(lock)
    return False


def _read(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}


def _machine() -> str:
    """The running system: the same for all its processes, another after it was started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
