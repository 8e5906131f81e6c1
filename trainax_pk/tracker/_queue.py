"""The queue between a run and its trackers."""

import queue
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainax_pk.tracker._base import AbstractTracker

_LENGTH = 4096
# How long the end of a run waits for trackers that have fallen behind.
_PATIENCE = 5.0

Call = Callable[[AbstractTracker], None]


class Tracking:
    """Passes lines on to trackers, without ever waiting for them.

    Attributes:
        num_dropped: Calls that were left out because a tracker had fallen behind.
    """

    def __init__(self, trackers: Sequence[AbstractTracker]) -> None:
        self.num_dropped = 0
        self._lanes = [_Lane(tracker) for tracker in trackers]

    def open(self, run_dir: Path) -> None:
        """Begins."""
        for lane in self._lanes:
            lane.start()
        self._send(lambda tracker: tracker.open(run_dir))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line."""
        self._send(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Lets the trackers end; says what went wrong with them."""
        self._send(lambda tracker: tracker.close())
        deadline = time.monotonic() + _PATIENCE
        for lane in self._lanes:
            problem = lane.end(deadline)
            if problem is not None:
                warnings.warn(
                    f"{type(lane.tracker).__name__} {problem}. The run was not touched by "
                    "it: metrics.jsonl holds everything.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _send(self, call: Call) -> None:
        self.num_dropped += sum(not lane.send(call) for lane in self._lanes)


class _Lane:
    """One tracker, its queue and its thread: a slow one does not hold up the others."""

    def __init__(self, tracker: AbstractTracker) -> None:
        self.tracker = tracker
        self._calls: queue.Queue[Call | None] = queue.Queue(_LENGTH)
        self._error: BaseException | None = None
        # The interpreter may end while a backend hangs.
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, call: Call) -> bool:
        """Whether there was room."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def end(self, deadline: float) -> str | None:
        """Waits until then at most; what went wrong, or None."""
        try:
            self._calls.put(None, timeout=max(0.0, deadline - time.monotonic()))
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self._error is not None:
            return f"failed ({type(self._error).__name__}: {self._error})"
        if self._thread.is_alive():
            return f"had not ended {_PATIENCE:g} s after the run, and is left behind"
        return None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None:
                try:
                    call(self.tracker)
                except BaseException as error:  # an exit would end this thread alone
                    self._error = error
