"""Ctrl-C and SIGTERM: what is in hand is put away, then the run ends; a second one ends it now."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable

_HELD = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Holds SIGINT and SIGTERM back while in a with block.

    The first of them calls `stop`, and is delivered at the end of the block to whoever would have
    had it (the default of SIGINT raises KeyboardInterrupt). A second is delivered at once. Signals
    reach the main thread only: in another one this does nothing.

    Args:
        stop: is to make the block end soon; called between two instructions of the main thread,
            so it takes no lock.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._before: dict[int, object] = {}
        self._held: int | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _HELD:
                self._before[number] = signal.signal(number, self._hold)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._restore()
        # Where another error is on its way it says more than the signal.
        if self._held is not None and kind is None:
            signal.raise_signal(self._held)

    def _hold(self, number: int, _: object) -> None:
        if self._held is not None:
            self._held = None
            self._restore()
            signal.raise_signal(number)
            return
        self._held = number
        self._stop()
        warnings.warn(
            f"{signal.Signals(number).name}: finishing the batch in hand; again to stop at once",
            stacklevel=2,
        )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
