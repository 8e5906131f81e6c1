"""Signals that ask a run to end: noted at once, obeyed where the state is whole."""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType

_log = logging.getLogger("trainax_pk")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Notes SIGTERM and SIGINT while it is entered; restores the handlers after.

    The first signal sets a flag. A second one ends the run without saving, unless a save
    is under way, which is let finish; a third ends the process at once. Nothing is
    installed off the main thread.

    Attributes:
        received: Number of the first signal, or None.
        saving: Set by the owner while a save must not be disturbed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.saving = False
        self._count = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # A handler that C code has installed could not be restored.
                if signal.getsignal(number) is not None:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def end(self) -> BaseException:
        """The exception that ends the run."""
        if self.received == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._count += 1
        if self._count >= 3:
            os._exit(128 + number)
        name = signal.Signals(number).name
        if self._count == 1:
            self.received = number
            _log.warning("%s: the run saves and ends after this chunk.", name)
        elif self.saving:
            _log.warning("%s: waiting for the save; once more ends at once.", name)
        else:
            _log.warning("%s again: the run ends without saving.", name)
            raise self.end()
