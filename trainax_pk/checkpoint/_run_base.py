"""What a training loop tells, and asks, about its run."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

from jaxtyping import PyTree

from trainax_pk.checkpoint._load import Match
from trainax_pk.checkpoint._store import Checkpoint
from trainax_pk.checkpoint._writer import Frozen


@dataclasses.dataclass(frozen=True)
class Segment:
    """When to stop for now; the run is continued by calling the trainer again.

    Attributes:
        epochs: Epochs of this call.
        minutes: Minutes of this call; it stops after the chunk under way.

    Raises:
        ValueError: A number that is not positive, or neither.

    Example:
        >>> from trainax_pk.checkpoint import Segment
        >>> Segment(minutes=55).minutes
        55
    """

    epochs: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        limits = [x for x in (self.epochs, self.minutes) if x is not None]
        numbers = [x for x in limits if isinstance(x, Real) and not isinstance(x, bool)]
        positive = len(numbers) == len(limits) and all(
            0 < x < math.inf for x in numbers
        )
        if not limits or not positive:
            raise ValueError(
                "Expected `epochs` or `minutes` to be a positive number, got "
                f"{self.epochs!r} and {self.minutes!r}. Pass for example minutes=55."
            )


class Point(NamedTuple):
    """Where training stands between two chunks.

    Attributes:
        done: Number of updates done.
        freeze: Begins to gather a checkpoint of it.
        best: Steps whose checkpoints are to be kept because they are best, each with
            what begins to gather it, or None for one that was saved before.
    """

    done: int
    freeze: Callable[[], Frozen]
    best: Callable[[], Mapping[int, Callable[[], Frozen] | None]]


class Verdict(NamedTuple):
    """What is to be done between two chunks.

    Attributes:
        signal: Number of a signal that is to be obeyed, or 0.
        finished: Whether all updates are done, or training ends early.
        over: Whether to stop, finished or not.
        saves: Whether a checkpoint is to be written.
    """

    signal: int
    finished: bool
    over: bool
    saves: bool


class AbstractRun(abc.ABC):
    """What a training loop tells, and asks, about its run.

    To add one: implement all of these. `NoRun` is one that does nothing.
    """

    @abc.abstractmethod
    def __enter__(self) -> "AbstractRun":
        """Begins to hold what the run needs."""

    @abc.abstractmethod
    def __exit__(self, *raised: Any) -> None:
        """Lets go of it."""

    @abc.abstractmethod
    def restore(self, state: PyTree[Any]) -> Checkpoint | None:
        """What to continue from, fitting the state; None at a beginning."""

    @abc.abstractmethod
    def gap(self, done: int) -> int | None:
        """Updates until the run has to be told, or None."""

    @abc.abstractmethod
    def note_updates(self, series: dict[str, Any]) -> None:
        """Takes what was recorded of the next updates."""

    @abc.abstractmethod
    def note_record(self, step: int, name: str, value: Any) -> None:
        """Takes what a callback returned."""

    @abc.abstractmethod
    def at_boundary(self, point: Point, *, reason: str | None = None) -> bool:
        """Between two chunks: saves if due, ends if asked to.

        Returns whether to stop here for now. With a reason, the run ends here. Raises
        SystemExit or KeyboardInterrupt on a signal, after saving.
        """

    @abc.abstractmethod
    def save(self, point: Point) -> None:
        """Saves now, due or not: what follows ends the run."""

    @abc.abstractmethod
    def load(self, step: int) -> Checkpoint | None:
        """A checkpoint of this run, or None where there is no valid one."""

    @abc.abstractmethod
    def load_results(self, step: int) -> dict[str, PyTree[Any]]:
        """What callbacks returned when the run was finished at this step, by name."""

    @abc.abstractmethod
    def keep_results(self, step: int, results: Mapping[str, PyTree[Any]]) -> None:
        """Takes what callbacks returned after the last update, by name."""

    @abc.abstractmethod
    def note_start(self, other: str, match: Match) -> None:
        """Takes what was taken over from another run."""

    @abc.abstractmethod
    def note_failure(self, message: str) -> None:
        """Takes what made the run fail."""

    @abc.abstractmethod
    def poll(self) -> None:
        """Anywhere else: ends if asked to, as `at_boundary` does."""


class NoRun(AbstractRun):
    """A run that leaves nothing behind.

    Example:
        >>> from trainax_pk.checkpoint._run_base import NoRun
        >>> NoRun().gap(10) is None
        True
    """

    def __enter__(self) -> "NoRun":
        return self

    def __exit__(self, *raised: Any) -> None:
        del raised

    def restore(self, state: PyTree[Any]) -> None:
        """Nothing."""
        del state

    def gap(self, done: int) -> None:
        """Never."""
        del done

    def note_updates(self, series: dict[str, Any]) -> None:
        """Nothing is noted."""
        del series

    def note_record(self, step: int, name: str, value: Any) -> None:
        """Nothing is noted."""
        del step, name, value

    def at_boundary(self, point: Point, *, reason: str | None = None) -> bool:
        """Goes on."""
        del point, reason
        return False

    def save(self, point: Point) -> None:
        """Nothing is saved."""
        del point

    def load(self, step: int) -> None:
        """Nothing was saved."""
        del step

    def load_results(self, step: int) -> dict[str, PyTree[Any]]:
        """Nothing was kept."""
        del step
        return {}

    def keep_results(self, step: int, results: Mapping[str, PyTree[Any]]) -> None:
        """Nothing is kept."""
        del step, results

    def note_start(self, other: str, match: Match) -> None:
        """Nothing is noted."""
        del other, match

    def note_failure(self, message: str) -> None:
        """Nothing is noted."""
        del message

    def poll(self) -> None:
        """Goes on."""
