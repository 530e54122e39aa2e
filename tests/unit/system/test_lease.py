"""One worker at a time, on a machine and among machines; whoever is killed holds nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cfsp.system import lease
from cfsp.system.lease import hold_lease, holder, take

HOLD = "import sys, time; from pathlib import Path; from cfsp.system.lease import take; l = take(Path(sys.argv[1])); " \
    "print('held' if l else 'no', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "work")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lease_has_one_holder_until_its_release(tmp_path):
    path = tmp_path / "a" / "work"
    first = take(path)
    assert first is not None
    assert take(path) is None
    assert holder(path) == f"process {os.getpid()} on {json.loads(path.read_text())['host']}"
    first.release()
    assert holder(path) is None
    assert list(path.parent.iterdir()) == []
    again = take(path)
    assert again is not None
    again.release()


def test_a_killed_process_holds_no_lease(tmp_path, other):
    path = tmp_path / "work"
    assert take(path) is None
    assert str(other.pid) in str(holder(path))
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder(path) is None
    mine = take(path)
    assert mine is not None
    mine.release()


def test_waiting_ends_when_the_holder_releases(tmp_path, other):
    told = []
    other.send_signal(signal.SIGSTOP)  # asleep it still has its lock
    subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({other.pid}, 9)"])
    with hold_lease(tmp_path / "work", told.append):
        assert holder(tmp_path / "work")
    assert len(told) == 1
    assert str(other.pid) in told[0]


def _of_another_machine(path, age):
    path.write_text(json.dumps({"host": "far", "machine": "another", "process": 7, "token": "theirs"}))
    os.utime(path, (time.time() - age,) * 2)


def test_another_machine_keeps_the_lease_while_its_heartbeat_continues(tmp_path, monkeypatch):
    path = tmp_path / "work"
    _of_another_machine(path, age=lease.STALE / 2)
    assert take(path) is None
    assert holder(path) == "process 7 on far"
    _of_another_machine(path, age=lease.STALE * 2)
    assert holder(path) is None
    mine = take(path)
    assert mine is not None
    monkeypatch.setattr(lease, "_machine", lambda: "a third one")
    assert take(path) is None
    mine.release()


def test_the_holder_renews_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    path = tmp_path / "work"
    mine = take(path)
    assert mine is not None
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.stat().st_mtime > 0
    mine.release()


def test_a_lease_that_was_replaced_meanwhile_is_not_removed(tmp_path):
    path = tmp_path / "work"
    _of_another_machine(path, age=0)
    lease._remove_lost(path, over="an older one", token="mine")
    assert json.loads(path.read_text())["token"] == "theirs"
    lease._remove_lost(path, over="theirs", token="mine")
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_many_processes_hold_the_lease_in_turn(tmp_path):
    """Eight processes count up a number in a file, each twenty times: without mutual exclusion some are lost."""
    code = (
        "import sys; from pathlib import Path; from cfsp.system.lease import hold_lease\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with hold_lease(folder / 'lease', lambda who: None, every=0.001):\n"
        "        count = int((folder / 'n').read_text()); (folder / 'n').write_text(str(count + 1))\n"
    )
    (tmp_path / "n").write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(8)]
    assert [process.wait(60) for process in running] == [0] * 8
    assert (tmp_path / "n").read_text() == "160"


def test_a_former_holder_does_not_renew_the_lease_of_its_successor(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    first = take(tmp_path / "work")
    assert first is not None
    values = json.loads((tmp_path / "work").read_text()) | {"token": "another", "machine": "another"}
    (tmp_path / "work").write_text(json.dumps(values))
    time.sleep(0.1)
    os.utime(tmp_path / "work", (1, 1))
    time.sleep(0.1)
    assert (tmp_path / "work").stat().st_mtime == 1
    first.release()
    assert (tmp_path / "work").is_file(), "the other's lease stays"
    assert "another has it now" in caplog.text
