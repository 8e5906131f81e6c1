"""What a tracker is."""

import abc
from pathlib import Path
from typing import Any


class AbstractTracker(abc.ABC):
    """Shows the lines of a run's metric log elsewhere.

    Its methods are called by a thread of their own, one after another. What they raise is
    a warning, and they are not called again in this run; what takes too long is left
    out. A run that goes on sends the lines after its checkpoint once more.

    To add one: implement the three methods; load the library in `open` and name the extra
    that installs it. Pass an instance to a trainer, `trackers=[...]`.
    """

    @abc.abstractmethod
    def open(self, run_dir: Path) -> None:
        """Begins or goes on with the run of this folder."""

    @abc.abstractmethod
    def log(self, step: int, values: dict[str, Any]) -> None:
        """Takes one line: numbers, lists of numbers, or None for what is not finite."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends. Not called after a failure."""
