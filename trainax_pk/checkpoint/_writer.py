"""Saves beside training, one at a time."""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from trainax_pk._extras import load
from trainax_pk.checkpoint._arrays import ORBAX, name_leaves
from trainax_pk.checkpoint._log import MetricLog
from trainax_pk.checkpoint._policy import Schedule
from trainax_pk.checkpoint._store import Store

# What is frozen when a save begins; it is gathered where nobody waits for it.
Frozen = Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]]
PARAMS = "state.params"


class NotFinite(RuntimeError):
    """A state with NaN or infinity in its parameters, which is never saved.

    Example:
        >>> from trainax_pk.checkpoint import NotFinite
        >>> str(NotFinite("state.params.weight"))
        'state.params.weight'
    """


class SaveFailed(OSError):
    """The last save of a run did not work: its folder ends before its training.

    Attributes:
        step: Number of updates done.
        model: The model after them, where the trainer that raises this knows it.

    Example:
        >>> from trainax_pk.checkpoint import SaveFailed
        >>> SaveFailed("the disk is full", 100).step
        100
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        self.model: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Left to itself, pickle would call the class with the message alone.
        return type(self), (*self.args, self.step), self.__dict__


class Writer:
    """Writes checkpoints in a thread of its own, in the order of their steps."""

    def __init__(self, store: Store, schedule: Schedule, log: MetricLog) -> None:
        self._store = store
        self._schedule = schedule
        self._log = log
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._infinite: dict[str, np.ndarray] = {}
        # Loading it takes a fifth of a second, in which the first program compiles.
        self._pool.submit(load, ORBAX)

    def allow_infinite(self, state: Any) -> None:
        """Takes a state before training: parameters infinite there may stay so.

        Args:
            state: With `params`.
        """
        hosts = {
            path: np.asarray(x)
            for path, x in name_leaves(state.params, PARAMS).items()
            if getattr(x, "is_fully_addressable", True)
        }
        self._infinite = {p: x for p, x in hosts.items() if np.isinf(x).any()}

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self._pending.done()

    def begin(
        self, states: Mapping[int, Frozen], identity: Mapping[str, Any], good: set[int]
    ) -> None:
        """Begins a save.

        Args:
            states: What to write, by step, in this order; what is there already is not
                written again.
            identity: Of the run.
            good: Steps whose checkpoints are to be kept.
        """
        self._pending = self._pool.submit(self._write, states, identity, good)

    def take_error(self) -> BaseException | None:
        """Waits for the save under way, if any; what went wrong with it, told once."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.exception()

    def close(self) -> None:
        """Waits and ends the thread."""
        with contextlib.suppress(RuntimeError):
            self._pool.shutdown(wait=True)

    def _write(
        self, states: Mapping[int, Frozen], identity: Mapping[str, Any], good: set[int]
    ) -> None:
        self._log.settle()
        for step, frozen in states.items():
            if not self._store.has(step):
                arrays, meta = frozen()
                _check_finite(arrays, self._infinite)
                self._store.write(step, arrays, {**meta, "identity": identity})
        # What lies there already may be another's.
        self._store.guard(max(states))
        self._store.retain(lambda steps: self._schedule.kept(steps) | good)


def _check_finite(
    arrays: Mapping[str, Any], infinite: Mapping[str, np.ndarray]
) -> None:
    for path, x in arrays.items():
        if not path.startswith(PARAMS):
            continue
        host = np.asarray(x)
        bad = ~np.isfinite(host)
        if path in infinite:
            bad &= host != infinite[path]
        if bad.any():
            raise NotFinite(
                f"{path} is not finite; such a state is not saved, and the last one "
                "that was finite stays the newest"
            )
