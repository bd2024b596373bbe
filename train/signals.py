"""Ctrl-C and SIGTERM as a request that the loop reads between steps."""

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, SIGINT and SIGTERM set `signal` instead of ending the process; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        signal: the signal that asked to stop, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
