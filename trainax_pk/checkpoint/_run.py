"""A training run that lives in a folder: what the trainer calls, and when."""

import abc
import contextlib
import dataclasses
import datetime
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import PyTree

from trainax_pk._files import hold_lock
from trainax_pk.checkpoint._arrays import compare_leaves
from trainax_pk.checkpoint._identity import Identity, check_unchanged
from trainax_pk.checkpoint._log import MetricLog
from trainax_pk.checkpoint._policy import Policy, Schedule
from trainax_pk.checkpoint._signals import Interrupts
from trainax_pk.checkpoint._store import Checkpoint, Store
from trainax_pk.checkpoint._writer import Frozen, NotFinite, Writer

# Part of its time that training may wait for saves by time.
_SHARE = 0.01


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
        if not limits or not all(0 < x < math.inf for x in limits):
            raise ValueError(
                "Expected `epochs` or `minutes` to be a positive number, got "
                f"{self.epochs!r} and {self.minutes!r}. Pass for example minutes=55."
            )


class AbstractRun(abc.ABC):
    """What a training loop tells, and asks, about its run.

    To add one: implement all of these. `NoRun` is one that does nothing.
    """

    @abc.abstractmethod
    def __enter__(self) -> "AbstractRun":
        """Begins to hold what the run needs."""

    @abc.abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
    def at_boundary(self, done: int, freeze: Callable[[], Frozen]) -> bool:
        """Between two chunks: saves if due, ends if asked to.

        Returns whether to stop here for now. Raises SystemExit or KeyboardInterrupt on
        a signal, after saving.
        """

    @abc.abstractmethod
    def poll(self) -> None:
        """Anywhere else: ends if asked to, as `at_boundary` does."""


class NoRun(AbstractRun):
    """A run that leaves nothing behind.

    Example:
        >>> from trainax_pk.checkpoint._run import NoRun
        >>> NoRun().at_boundary(10, lambda: None)
        False
    """

    def __enter__(self) -> "NoRun":
        return self

    def __exit__(self, *unused: object) -> None:
        del unused

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

    def at_boundary(self, done: int, freeze: Callable[[], Frozen]) -> bool:
        """Goes on."""
        del done, freeze
        return False

    def poll(self) -> None:
        """Goes on."""


class Run(AbstractRun):
    """A run in a folder: locked, saved, resumed, and ended by signals.

    Attributes:
        folder: The run directory: `checkpoints/`, `metrics.jsonl`, `events.jsonl`, `lock`.
        blocked: Seconds that training has waited for all of this.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        policy: Policy,
        identity: Identity,
        num_steps: int,
        steps_per_epoch: Fraction,
        log_every: int,
        segment: Segment | None,
        allow_changes: Iterable[str],
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.blocked = 0.0
        self._policy = policy
        self._identity = identity
        self._num_steps = num_steps
        self._steps_per_epoch = steps_per_epoch
        self._segment = segment
        self._allowed = tuple(allow_changes)
        self._schedule = Schedule(policy, num_steps, steps_per_epoch)
        self._store = Store(self.folder / "checkpoints")
        self._log = MetricLog(self.folder / "metrics.jsonl", log_every)
        self._interrupts = Interrupts()
        self._stack = contextlib.ExitStack()
        self._last: tuple[int, Callable[[], Frozen]] | None = None
        self._saved = self._start = 0
        self._wait = policy.every_seconds

    def __enter__(self) -> "Run":
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._stack as stack:
            stack.enter_context(
                hold_lock(
                    self.folder / "lock",
                    0.0,
                    f"the run directory {self.folder}",
                    "Wait for that process or end it, or train in another run_dir.",
                )
            )
            self._writer = Writer(self._store, self._schedule, self._log)
            stack.callback(self._writer.close)
            stack.enter_context(self._interrupts)
            self._stack = stack.pop_all()
        self._began = self._saved_at = time.monotonic()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def restore(self, state: PyTree[Any]) -> Checkpoint | None:
        """The newest valid checkpoint, compared field by field with this run.

        Raises:
            RunChanged: A field that must match does not, or a leaf of the state.
            CheckpointDamaged: There are checkpoints, and none is valid.
            ValueError: The run has done more updates than it is asked for.
        """
        self._store.tidy()
        found = self._store.newest()
        if found is None:
            self._log.resume(0, {})
            self._note("started", 0)
            return None
        must, may = self._identity.changes(found.meta["identity"])
        leaves = compare_leaves(found.leaves, state, "state")
        allowed = check_unchanged(must, leaves, self._allowed)
        if found.step > self._num_steps:
            raise ValueError(
                f"Expected num_training_steps >= {found.step}, which the run in "
                f"{self.folder} has done, got {self._num_steps}. Ask for as many or more, "
                "or begin in another run_dir."
            )
        changed = {**allowed, **may}
        self._note("resumed", found.step, **({"changed": changed} if changed else {}))
        history = {
            path.removeprefix("history."): x
            for path, x in found.arrays.items()
            if path.startswith("history.")
        }
        self._log.resume(found.step, history)
        self._start = self._saved = found.step
        return found

    def gap(self, done: int) -> int | None:
        """Updates until a save is due by their number, or the segment ends."""
        gaps = [self._schedule.gap(done), self._segment_gap(done)]
        return min([g for g in gaps if g is not None], default=None)

    def note_updates(self, series: dict[str, Any]) -> None:
        """Writes lines of the metric log."""
        with self._timed():
            self._log.add_updates({k: np.asarray(x) for k, x in series.items()})

    def note_record(self, step: int, name: str, value: Any) -> None:
        """Writes a line of the metric log, with the next chunk."""
        self._log.add_record(step, name, value)

    def at_boundary(self, done: int, freeze: Callable[[], Frozen]) -> bool:
        """Saves if due, and at the end; ends if a signal came or the segment is over."""
        self._last = (done, freeze)
        self.poll()
        over = done == self._num_steps or self._segment_is_over(done)
        with self._timed():
            if over:
                self._log.flush()
                self._save(done, freeze)
                self._finish()
            elif done > self._saved and self._is_due(done):
                self._begin(done, freeze)
        if over:
            kind = "finished" if done == self._num_steps else "stopped"
            self._note(kind, done, blocked_seconds=round(self.blocked, 4))
        return over and done < self._num_steps

    def poll(self) -> None:
        """Saves what is done and ends if a signal came."""
        if self._interrupts.received is None:
            return
        done = self._start
        if self._last is not None:
            done, freeze = self._last
            self._save(done, freeze)
            self._finish()
        self._note("interrupted", done, signal=self._interrupts.received)
        raise self._interrupts.end()

    def _is_due(self, done: int) -> bool:
        if self._schedule.is_due(done):
            return True
        waited = time.monotonic() - self._saved_at
        return (
            self._wait is not None and waited >= self._wait and not self._writer.is_busy
        )

    def _begin(self, done: int, freeze: Callable[[], Frozen]) -> None:
        began = time.monotonic()
        self._tell(self._writer.take_error())
        frozen, identity = freeze(), self._identity.to_json()

        def gather() -> tuple[Any, Any]:
            arrays, meta = frozen()
            return arrays, {**meta, "identity": identity}

        self._writer.begin(done, gather)
        self._saved, self._saved_at = done, time.monotonic()
        if self._wait is not None:
            blocked = time.monotonic() - began
            self._wait = max(self._policy.every_seconds or 0.0, blocked / _SHARE)

    def _save(self, done: int, freeze: Callable[[], Frozen]) -> None:
        self._interrupts.saving = True
        if done > self._saved:
            self._begin(done, freeze)

    def _finish(self) -> None:
        """Waits for the last save; what went wrong with it is an error of the run."""
        error = self._writer.take_error()
        self._interrupts.saving = False
        if isinstance(error, NotFinite):
            self._tell(error)
        elif error is not None:
            self._saved = -1
            raise error

    def _tell(self, error: BaseException | None) -> None:
        if error is not None:
            warnings.warn(
                f"A save failed ({type(error).__name__}: {error}). Training goes on; "
                "older checkpoints are untouched, and the next save is tried as usual.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _segment_gap(self, done: int) -> int | None:
        if self._segment is None or self._segment.epochs is None:
            return None
        length = math.ceil(Fraction(self._segment.epochs) * self._steps_per_epoch)
        return max(0, self._start + length - done)

    def _segment_is_over(self, done: int) -> bool:
        if self._segment is None:
            return False
        minutes = (time.monotonic() - self._began) / 60
        by_time = self._segment.minutes is not None and minutes >= self._segment.minutes
        return self._segment_gap(done) == 0 or (by_time and done > self._start)

    def _note(self, event: str, step: int, **values: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "event": event, "step": step, **values})
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def _timed(self) -> Any:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.blocked += time.perf_counter() - began
