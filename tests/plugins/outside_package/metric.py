"""A metric that keeps the last neurons, with a setting of each meaning for the identity of a run."""

from __future__ import annotations

from typing import Annotated

from cfsp.components import Decides, component


@component
class LastFirst:
    sign: float = 1.0
    comment: Annotated[str, Decides("nothing")] = ""
    table: Annotated[str | None, Decides("content")] = None
    power: Annotated[float, Decides(before=1.0)] = 1.0

    def score(self, channels, activation):
        return self.sign * activation.rms.new_tensor(range(channels.n)) ** self.power
