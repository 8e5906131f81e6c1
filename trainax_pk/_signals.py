"""Signals that ask a run to end: noted at once, obeyed where the state is whole."""

import contextlib
import logging
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_log = logging.getLogger("trainax_pk")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# How long the main thread may take to obey SIGTERM: compiling, it does not hear.
_PATIENCE = 5.0


class Interrupts:
    """Notes SIGTERM and SIGINT while it is entered; restores the handlers after.

    The first signal sets a flag. A second one ends the run without saving, unless a save
    is under way, which is let finish; a third ends the process at once. Nothing is
    installed off the main thread.

    Python runs handlers between its own instructions alone, and a program takes minutes
    to compile sometimes. So a thread hears signals, too: if the main thread has not
    obeyed SIGTERM after some seconds, it has the last state saved and ends the process.

    Attributes:
        received: Number of the first signal, or None.
        saving: Set by the owner while a save must not be disturbed.
        obeyed: Set by the owner when it begins to end.
    """

    def __init__(
        self,
        on_deaf: Callable[[], None] = lambda: None,
        *,
        promise: str = "the run saves and ends after this chunk",
        loss: str = "the run ends without saving",
    ) -> None:
        """Installs nothing yet.

        Args:
            on_deaf: Called in another thread before the process ends because the main
                thread does not hear.
            promise: What is said at the first signal.
            loss: What is said at the second.
        """
        self.received: int | None = None
        self.saving = False
        self.obeyed = threading.Event()
        self._on_deaf = on_deaf
        self._promise, self._loss = promise, loss
        self._count = 0
        self._previous: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._listener: threading.Thread | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # A handler that C code has installed could not be restored.
                if signal.getsignal(number) is not None:
                    self._previous[number] = signal.signal(number, self._note)
            self._listen()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.obeyed.set()
        if self._pipe is not None and self._listener is not None:
            signal.set_wakeup_fd(-1)
            os.write(self._pipe[1], b"\0")
            self._listener.join()
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def end(self) -> BaseException:
        """The exception that ends the run."""
        if self.received == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + signal.SIGTERM)

    def _listen(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if other != -1:
            # An event loop listens already, and has to go on doing so.
            signal.set_wakeup_fd(other)
            os.close(reader)
            os.close(writer)
            return
        self._pipe = (reader, writer)
        self._listener = threading.Thread(
            target=self._wait_for_main, args=(reader,), name="signals", daemon=True
        )
        self._listener.start()

    def _wait_for_main(self, reader: int) -> None:
        count, deadline = 0, None
        # Of any descriptor, where select() takes those below 1024 alone.
        waiting = selectors.DefaultSelector()
        waiting.register(reader, selectors.EVENT_READ)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if waiting.select(left):
                number = os.read(reader, 1)[0]
                if number == 0:
                    waiting.close()
                    return
                count += number in _SIGNALS
                if count >= 3:
                    os._exit(128 + number)
                if number == signal.SIGTERM and deadline is None:
                    deadline = time.monotonic() + _PATIENCE
                continue
            deadline = None
            if not self.obeyed.is_set():
                self.received = self.received or signal.SIGTERM
                with contextlib.suppress(Exception):
                    self._on_deaf()
                if not self.obeyed.is_set():
                    os._exit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._count += 1
        if self._count >= 3:
            os._exit(128 + number)
        name = signal.Signals(number).name
        if self._count == 1:
            self.received = number
            _log.warning("%s: %s.", name, self._promise)
        elif self.saving:
            _log.warning("%s: waiting for the save; once more ends at once.", name)
        else:
            _log.warning("%s again: %s.", name, self._loss)
            raise self.end()
