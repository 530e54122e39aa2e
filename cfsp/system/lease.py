"""Leases, which give work to one process at a time: an OS lock within a machine, a heartbeat between machines.

On one machine a lock ends with its process, so the leases of a killed process are free at once. Machines that share a
file system may not share locks. There a lease file names the worker, who touches it every few seconds; a lease that was
not touched for :data:`STALE` seconds is lost. Clocks of machines are never compared: the file system that holds the
file states the age of a heartbeat.

This is written by hand because lock libraries (filelock, portalocker) have no lease among machines.
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

#: Seconds between two heartbeats, and seconds without a heartbeat after which another machine's lease is lost.
BEAT, STALE = 5.0, 60.0


class Lease:
    """Exclusive right to the work named by ``path``, until :meth:`release` or the end of the process."""

    def __init__(self, path: Path, lock: int, token: str) -> None:
        self.path, self._lock, self._token = path, lock, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lease of {path.name}")
        self._thread.start()

    def release(self) -> None:
        """Release the lease; other processes may take it from now on."""
        self._stop.set()
        self._thread.join()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)
        _lock_file(self.path).unlink(missing_ok=True)  # before the lock is released, see _lock
        os.close(self._lock)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            if _read(self.path).get("token", self._token) != self._token:
                log.warning("%s: this process was away for too long, another has it now", self.path.name)
                return
            with suppress(OSError):
                os.utime(self.path)


def take(path: Path) -> Lease | None:
    """Take the lease at ``path`` without waiting.

    A missing folder is created.

    Returns:
        The lease; None while another process has it.

    Raises:
        OSError: the lease file cannot be written; the error names it.
    """
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
        _lock_file(path).unlink(missing_ok=True)  # before the lock is released, see _lock
        raise
    finally:
        if not claimed:
            os.close(lock)
    return Lease(path, lock, token) if claimed else None


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _lock(path: Path) -> int | None:
    """Lock the file at ``path`` until the returned descriptor is closed; None while another process has it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            return lock  # on a file system without locks only the heartbeat decides
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # its holder removed the file between the two steps above; other processes lock its successor


def holder(path: Path) -> str | None:
    """Return the current holder of the lease, as ``process N on HOST``; None if it is free."""
    lease = _read(path)
    if not lease:
        return None
    if lease.get("machine") == _machine():
        alive = _is_locked(path)
    else:
        alive = not _is_stale(path)
    return f"process {lease.get('process')} on {lease.get('host')}" if alive else None


@contextmanager
def hold_lease(path: Path, announce: Callable[[str], object], every: float = 0.2) -> Iterator[None]:
    """Hold the lease at ``path`` inside the context; wait for it as long as necessary.

    Args:
        path: lease file.
        announce: called once with the current holder if this has to wait.
        every: seconds between two attempts.
    """
    lease, announced = take(path), False
    while lease is None:
        if not announced:
            announce(holder(path) or "another process")
            announced = True
        time.sleep(every)
        lease = take(path)
    try:
        yield
    finally:
        lease.release()


def _claim(path: Path, token: str) -> bool:
    """Write the lease file unless another machine holds it; the caller has the machine's lock, if locks exist."""
    mine = path.with_name(f".{path.name}.{token}")
    values = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "token": token}
    try:
        mine.write_text(json.dumps(values), encoding="utf-8")
        for _ in range(2):
            with suppress(FileExistsError):
                os.link(mine, path)  # fails if the lease exists, also on a shared file system
                return True
            current = _read(path)
            if current.get("machine") != _machine() and not _is_stale(path):
                return False
            _remove_lost(path, current.get("token"), token)
        return False
    finally:
        mine.unlink(missing_ok=True)


def _remove_lost(path: Path, over: str | None, token: str) -> None:
    """Remove a lost lease; a new lease that has replaced it meanwhile is put back.

    Args:
        path: lease file.
        over: token of the lost lease.
        token: token of the lease that is being taken, which makes a unique name.
    """
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
    """Return an id of the running system; a restart changes it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
