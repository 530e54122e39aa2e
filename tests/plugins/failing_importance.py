"""Metrics for the sweep's tests: one that raises, one that takes its process with it, one that waits for a file."""

import os
import signal
import time
from pathlib import Path

from cfsp.importance.magnitude import Magnitude


class Raises(Magnitude):
    def score(self, channels, activation):
        raise ValueError("this metric does not work")


class Same(Magnitude): ...


class Twin(Magnitude): ...


class Dies(Magnitude):
    def score(self, channels, activation):
        os.kill(os.getpid(), signal.SIGKILL)


class Waits(Magnitude):
    def score(self, channels, activation):
        while not Path(os.environ["GATE"]).exists():
            time.sleep(0.1)
        return super().score(channels, activation)
