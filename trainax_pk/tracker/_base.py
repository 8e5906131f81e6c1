"""What a tracker is."""

import abc
import re
from collections.abc import Callable
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


def flat_values(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by names that backends take, such as `rollout/nrmse/0`."""
    return {
        re.sub(r"\W+", "/", f"{name}{place}").strip("/"): number
        for name, value in values.items()
        for place, number in _numbers(value)
    }


def remembered(run_dir: Path, name: str, make: Callable[[], str]) -> str:
    """What a backend calls this run: made once, and kept in the run directory."""
    path = run_dir / name
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _numbers(value: Any) -> list[tuple[str, float]]:
    """The numbers of a nested list, each with its place."""
    if isinstance(value, list):
        pairs = [(i, pair) for i, x in enumerate(value) for pair in _numbers(x)]
        return [(f"[{i}]{place}", number) for i, (place, number) in pairs]
    return [] if value is None else [("", float(value))]
