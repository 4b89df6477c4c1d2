"""SIGINT and SIGTERM end a run after the step that they fall into, not in the middle of it."""

import os
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """
    Inside, SIGINT and SIGTERM are remembered; a second SIGINT interrupts at once.

    Attributes:
        received (`int`, *optional*): the number of the signal that came.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None):
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def number(self) -> int:
        """What stopped the run; where another process received it, SIGTERM."""
        return self.received or signal.SIGTERM


def outlive_a_signal(worker: int):
    """
    For processes that prepare batches, which must live to the end of the step: Ctrl-C, `timeout` and schedulers signal
    a whole group or all processes of a job. They leave the group, and of SIGTERM the second one ends them, since with
    that their parent clears away what has not ended by itself.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
