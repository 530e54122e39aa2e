"""Progress lines where nobody watches: their content, and that they come while one item takes long."""

from __future__ import annotations

import logging
import time

import pytest

from cfsp.system import progress as module
from cfsp.system.progress import Work, duration, progress, working


@pytest.fixture
def lines(monkeypatch, caplog):
    """The lines that are written, every 0.05 seconds instead of every minute."""
    monkeypatch.setattr(module, "INTERVAL", 0.05)
    caplog.set_level(logging.INFO, logger="cfsp.system.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def waited_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "no line came"
        time.sleep(0.01)


def test_a_line_gives_position_rate_and_time_left():
    work = Work("calibrate", "block", 30, done=10, started=0.0)
    assert work.line(100.0) == "calibrate: block 11 of 30, 10.0 s each, 3 min left"
    assert Work("search", "candidate", 1000, 500, 0.0).line(10.0) == "search: candidate 501 of 1000, 50.0/s, 10 s left"


def test_a_line_about_the_first_item_gives_the_time_so_far():
    assert Work("refit", "block", 29, started=0.0).line(75.0) == "refit: block 1 of 29, 75 s"
    assert Work("plan", started=0.0).line(180.0) == "plan: 3 min"


def test_more_items_than_were_announced_do_not_give_a_negative_time():
    assert Work("zero-shot", "request", 10, 12, 0.0).line(24.0) == "zero-shot: request 10 of 10, 2.4 s each, 0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_comes_while_a_single_item_takes_long_and_names_the_outer_work_first(lines):
    with working("plan"):
        for _ in progress(range(2), "prune in sequence", "block"):
            before = len(lines())
            waited_for(lambda before=before: len(lines()) > before)
    assert lines()[0].startswith("plan: 0 s; prune in sequence: block 1 of 2")
    assert any("block 2 of 2" in line and "left" in line for line in lines())


def test_no_line_comes_after_the_work_has_ended(lines):
    with working("plan"):
        waited_for(lines)
    count = len(lines())
    time.sleep(0.2)
    assert len(lines()) == count


def test_an_error_and_a_break_end_the_work(lines):
    with pytest.raises(ZeroDivisionError), working("plan"):
        raise ZeroDivisionError
    for _ in progress(range(3), "search"):
        break
    assert module._reporter._works == []


def test_short_work_is_silent(lines, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 60)
    assert list(progress(range(5), "calibrate")) == [0, 1, 2, 3, 4]
    assert lines() == []
