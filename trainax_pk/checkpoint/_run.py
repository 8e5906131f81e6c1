"""A training run that lives in a folder: what the trainer calls, and when."""

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from trainax_pk._signals import Interrupts
from trainax_pk.checkpoint._arrays import compare_leaves
from trainax_pk.checkpoint._folder import (
    CHECKPOINTS,
    METRICS,
    hold_folder,
    keep_hold,
    note_event,
)
from trainax_pk.checkpoint._identity import Identity, check_unchanged
from trainax_pk.checkpoint._load import Match
from trainax_pk.checkpoint._log import MetricLog
from trainax_pk.checkpoint._policy import Policy, Schedule
from trainax_pk.checkpoint._results import keep_results, load_results, source_of
from trainax_pk.checkpoint._run_base import AbstractRun, Point, Segment, Verdict
from trainax_pk.checkpoint._store import (
    Checkpoint,
    CheckpointDamaged,
    NotRemoved,
    Store,
)
from trainax_pk.checkpoint._writer import Frozen, NotFinite, SaveFailed, Writer
from trainax_pk.tracker import AbstractTracker
from trainax_pk.tracker._queue import Tracking

# Part of its time that training may wait for saves by time.
_SHARE = 0.01


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
        trackers: Sequence[AbstractTracker] = (),
        saves_alone: bool = True,
        callbacks: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.blocked = 0.0
        self._policy = policy
        self._identity = identity
        self._num_steps = num_steps
        self._steps_per_epoch = steps_per_epoch
        self._segment = segment
        self._allowed = tuple(allow_changes)
        self._saves_alone = saves_alone
        self._callbacks = dict(callbacks or {})
        self._schedule = Schedule(policy, num_steps, steps_per_epoch)
        self._store = Store(self.folder / CHECKPOINTS, self._keep_hold)
        self._tracking = Tracking(trackers)
        path = self.folder / METRICS
        self._log = MetricLog(path, log_every, self._tracking.log if trackers else None)
        self._interrupts = Interrupts(self._end_for_deaf)
        # One thread saves at a time: this one, or that which ends the process instead.
        self._ending = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._last: Point | None = None
        self._saved = self._start = 0
        self._wait = policy.every_seconds

    def __enter__(self) -> "Run":
        with self._stack as stack:
            self._lock = stack.enter_context(hold_folder(self.folder))
            self._writer = Writer(self._store, self._schedule, self._log)
            stack.callback(self._writer.close)
            self._tracking.open(self.folder)
            stack.callback(self._tracking.close)
            stack.enter_context(self._interrupts)
            self._stack = stack.pop_all()
        self._began = self._saved_at = time.monotonic()
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            self._log.close(whole=raised[0] is None, guard=self._keep_hold)
        finally:
            self._stack.__exit__(*raised)
        # One that came during the last save: nothing is left to do but to obey.
        if raised[0] is None and self._interrupts.received is not None:
            raise self._interrupts.end()

    def restore(self, state: PyTree[Any]) -> Checkpoint | None:
        """The newest valid checkpoint, compared field by field with this run.

        Raises:
            RunChanged: A field that must match does not, or a leaf of the state.
            CheckpointDamaged: There are checkpoints, and none is valid.
            ValueError: The run has done more updates than it is asked for.
        """
        self._store.tidy()
        self._writer.allow_infinite(state)
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
        self.start_at(found.step)
        return found

    def start_at(self, step: int) -> None:
        """Goes on after so many updates."""
        self._start = self._saved = step

    def gap(self, done: int) -> int | None:
        """Updates until a save is due by their number, or the segment ends."""
        gaps = [self._schedule.gap(done), self._segment_gap(done)]
        return min([g for g in gaps if g is not None], default=None)

    def note_updates(self, series: dict[str, Any]) -> None:
        """Writes lines of the metric log."""
        with self._timed():
            hosts = {k: np.asarray(x) for k, x in series.items()}
            count = len(next(iter(hosts.values())))
            self._keep_hold(self._log.done + count)
            self._log.add_updates(hosts)

    def note_record(self, step: int, name: str, value: Any) -> None:
        """Writes a line of the metric log, with the next chunk."""
        self._log.add_record(step, name, value)

    def at_boundary(self, point: Point, *, reason: str | None = None) -> bool:
        """Saves if due, and at the end; ends if a signal came or the segment is over."""
        verdict = self.judge(point.done, self.signal, reason)
        self.carry_out(point, verdict, reason)
        if verdict.signal:
            raise self._interrupts.end()
        return verdict.over and not verdict.finished

    @property
    def signal(self) -> int:
        """Number of the first signal that came, or 0."""
        return self._interrupts.received or 0

    def judge(self, done: int, signal: int, reason: str | None = None) -> Verdict:
        """What is to be done after so many updates."""
        finished = done == self._num_steps or reason is not None
        over = finished or self._segment_is_over(done)
        due = bool(signal) or over or self._is_due(done)
        return Verdict(signal, finished, over, done > self._saved and due)

    def carry_out(
        self, point: Point, verdict: Verdict, reason: str | None = None
    ) -> None:
        """Saves, and writes down what happens."""
        self._last, done = point, point.done
        if verdict.signal:
            self._interrupts.received = verdict.signal
            self._interrupts.obeyed.set()
            with self._ending:
                self._save_last()
            return
        with self._timed(), self._ending:
            if verdict.over:
                self._save(point)
                self._finish()
            elif verdict.saves:
                self._begin(point)
        if verdict.over:
            why = {} if reason is None else {"reason": reason}
            blocked = round(self.blocked, 4)
            kind = "finished" if verdict.finished else "stopped"
            self._note(kind, done, **why, blocked_seconds=blocked)

    def mimic(self, point: Point, verdict: Verdict) -> None:
        """Takes the part of a process that does not write in what another one does."""
        if verdict.saves:
            self._states(point)
            self._saved = point.done

    def save(self, point: Point) -> None:
        """Saves now, due or not: what follows ends the run."""
        with self._timed(), self._ending:
            self._save(point)
            self._finish()

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step, verified. Raises CheckpointDamaged."""
        return self._store.read(step)

    def load(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step, verified."""
        try:
            return self.read(step)
        except CheckpointDamaged:
            return None

    def load_results(self, step: int) -> dict[str, PyTree[Any]]:
        """What callbacks returned when the run was finished at this step, by name."""
        source = source_of(self._identity, self._callbacks)
        return load_results(self.folder, step, source)

    def keep_results(self, step: int, results: Mapping[str, PyTree[Any]]) -> None:
        """Writes what callbacks returned after the last update, by name."""
        try:
            source = source_of(self._identity, self._callbacks)
            keep_results(self.folder, step, results, source)
        except OSError as error:
            warnings.warn(
                f"Results of the callbacks after {step} updates could not be kept "
                f"({error}). They are in the history; where the run is called again, the "
                "callbacks are, too.",
                RuntimeWarning,
                stacklevel=4,
            )

    def note_start(self, other: str, match: Match) -> None:
        """Writes what was taken over into the events."""
        lists = {
            name: list(getattr(match, name))
            for name in ("matched", "missing", "unused")
        }
        self._note("taken over", 0, run=other, of_step=match.step, **lists)

    def note_failure(self, message: str) -> None:
        """Writes the message into the events."""
        done = self._last.done if self._last else self._start
        self._note("failed", done, why=message)

    def poll(self) -> None:
        """Saves what is done and ends if a signal came."""
        if self._interrupts.received is None:
            return
        self._interrupts.obeyed.set()
        with self._ending:
            self._save_last()
        raise self._interrupts.end()

    def _end_for_deaf(self) -> None:
        """Saves what is done while the main thread computes; nothing changes it."""
        with self._ending:
            if self._interrupts.obeyed.is_set():
                return
            if self._saves_alone:
                self._save_last()
            else:
                self._note("interrupted", self._saved, signal=self.signal)

    def _save_last(self) -> None:
        done = self._start
        if self._last is not None:
            done = self._last.done
            self._save(self._last)
            self._finish()
        self._note("interrupted", done, signal=self._interrupts.received)

    def _is_due(self, done: int) -> bool:
        if self._schedule.is_due(done):
            return True
        waited = time.monotonic() - self._saved_at
        return (
            self._wait is not None and waited >= self._wait and not self._writer.is_busy
        )

    def _begin(self, point: Point) -> None:
        began = time.monotonic()
        self._keep_hold(point.done)
        self._tell(self._writer.take_error())
        states, best = self._states(point)
        self._writer.begin(states, self._identity.to_json(), best)
        self._saved, self._saved_at = point.done, time.monotonic()
        if self._wait is not None:
            blocked = time.monotonic() - began
            self._wait = max(self._policy.every_seconds or 0.0, blocked / _SHARE)

    def _states(self, point: Point) -> tuple[dict[int, Frozen], set[int]]:
        """What is to be written, and what is to be kept because it is best."""
        best = point.best()
        # What is best so far is saved before what is newest: whoever goes on from there
        # finds it.
        states = {
            step: freeze()
            for step, freeze in sorted(best.items())
            if freeze is not None and step < point.done
        }
        states[point.done] = point.freeze()
        return states, set(best)

    def _save(self, point: Point) -> None:
        self._interrupts.saving = True
        if point.done > self._saved:
            self._begin(point)

    def _finish(self) -> None:
        """Waits for the last save; what went wrong with it is an error of the run."""
        error = self._writer.take_error()
        self._interrupts.saving = False
        if error is None or isinstance(error, NotFinite | NotRemoved | SaveFailed):
            self._tell(error)
            return
        done, self._saved = self._saved, -1
        steps = self._store.steps()
        raise SaveFailed(
            f"Expected to save the state after {done} updates in {self.folder}, got "
            f"{type(error).__name__}: {error}. Make room, or mend what it names, and call "
            "again with the same run_dir: the run goes on from "
            f"{f'step {steps[-1]}' if steps else 'its beginning'} and ends in the same "
            "bits. The model is this exception's `model`.",
            done,
        ) from error

    def _tell(self, error: BaseException | None) -> None:
        if isinstance(error, SaveFailed):
            raise error  # the folder is another's
        if isinstance(error, NotRemoved):
            warnings.warn(
                f"Older checkpoints could not be removed ({error}). The newest was saved, "
                "and training goes on; they take up space until the next start removes "
                "them.",
                RuntimeWarning,
                stacklevel=2,
            )
        elif error is not None:
            warnings.warn(
                f"A save failed ({type(error).__name__}: {error}). Training goes on; "
                "older checkpoints are untouched, and the next save is tried as usual.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _segment_gap(self, done: int) -> int | None:
        if self._segment is None or self._segment.epochs is None:
            return None
        length = math.ceil(Fraction(str(self._segment.epochs)) * self._steps_per_epoch)
        return max(0, self._start + length - done)

    def _segment_is_over(self, done: int) -> bool:
        if self._segment is None:
            return False
        minutes = (time.monotonic() - self._began) / 60
        by_time = self._segment.minutes is not None and minutes >= self._segment.minutes
        return self._segment_gap(done) == 0 or (by_time and done > self._start)

    def _keep_hold(self, done: int) -> None:
        keep_hold(self.folder, self._lock, done)

    def _note(self, event: str, step: int, **values: Any) -> None:
        note_event(self.folder, event, step, **values)

    @contextlib.contextmanager
    def _timed(self) -> Any:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.blocked += time.perf_counter() - began
