"""Who works next, where one at a time may."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from itertools import count

Place = tuple[int, int]
"""The level of who waits, the lowest going first, and a number that grows with the time of arrival."""


class Turns:
    """Lets one at a time work: the most urgent first, and of equals who came first. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # its lock guards all below
        self._numbers = count()
        self._waiting: list[Place] = []
        self._taken = False

    def place(self, level: int) -> Place:
        """A place behind all of this level that came before; it may be used for several turns."""
        return level, next(self._numbers)

    def take(self, place: Place, deadline: float, gone: Future[None]) -> bool:
        """Wait for a turn until `deadline`, of time.monotonic(), or `gone` is done; whether it came."""
        gone.add_done_callback(self._look_again)
        with self._changed:
            self._waiting.append(place)
            try:
                while self._taken or min(self._waiting) != place:
                    left = deadline - time.monotonic()
                    if left <= 0 or gone.done():
                        return False
                    self._changed.wait(left)
                self._taken = True
                return True
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()  # perhaps only this one was before another

    def release(self) -> None:
        """End a turn."""
        with self._changed:
            self._taken = False
            self._changed.notify_all()

    def urgent(self, level: int) -> bool:
        """Whether somebody waits who goes before this level."""
        with self._changed:
            return any(other < level for other, _ in self._waiting)

    def _look_again(self, _: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()
