"""Metrics for the sweep's tests: one that raises, one that takes its process with it."""

import os
import signal

from cfsp.importance.magnitude import Magnitude


class Raises(Magnitude):
    def score(self, channels, activation):
        raise ValueError("this metric does not work")


class Dies(Magnitude):
    def score(self, channels, activation):
        os.kill(os.getpid(), signal.SIGKILL)
