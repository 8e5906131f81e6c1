"""When to save, and what to keep."""

import contextlib
import dataclasses
import math
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from trainax_pk._tree import check_count


@dataclasses.dataclass(frozen=True)
class Policy:
    """When a run is saved and which of its checkpoints are kept.

    A run is also saved when it ends, at the end of a segment, and on SIGTERM and SIGINT.
    Saving happens beside training; a save that is due while one is under way waits for
    the next chunk. Where saving is slow, saves by time come less often, so that training
    waits for them at most a hundredth of its time.

    Attributes:
        every_seconds: Time between saves, at least; None for none by time.
        every_steps: Save after every so many updates, too.
        keep_last: Newest checkpoints to keep.
        keep_steps: Save after every so many updates and keep these for good.
        keep_epochs: Save after these epochs and keep them for good: a slice of the
            numbers of epochs done, `slice(None, None, 10)` or "::10"; negative numbers
            count from the last.

    Raises:
        ValueError: A number out of its range, no slice.

    Example:
        >>> from trainax_pk.checkpoint import Policy
        >>> policy = Policy(every_steps=100, keep_last=3, keep_epochs="10::10")
        >>> policy.keep_epochs
        slice(10, None, 10)
    """

    every_seconds: float | None = 60.0
    every_steps: int | None = None
    keep_last: int = 2
    keep_steps: int | None = None
    keep_epochs: slice | str | None = None

    def __post_init__(self) -> None:
        seconds = self.every_seconds
        is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and 0 <= seconds < math.inf):
            raise ValueError(
                f"Expected `every_seconds` to be a number >= 0, got {seconds!r}. Pass "
                "None for no saves by time."
            )
        for name in ("every_steps", "keep_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("keep_last", self.keep_last)
        object.__setattr__(self, "keep_epochs", _as_slice(self.keep_epochs))


class Schedule:
    """A policy for a run of known length: at which steps it saves, and what it keeps."""

    def __init__(
        self, policy: Policy, num_steps: int, steps_per_epoch: Fraction
    ) -> None:
        self._policy = policy
        epochs = range(int(num_steps / steps_per_epoch) + 1)
        chosen = epochs[policy.keep_epochs] if policy.keep_epochs else ()
        self._epoch_ends = {math.ceil(e * steps_per_epoch) for e in chosen} - {0}

    def gap(self, done: int) -> int | None:
        """Updates until a save is due by their number; None if none is."""
        policy = self._policy
        every = [n for n in (policy.every_steps, policy.keep_steps) if n is not None]
        ends = [e - done for e in self._epoch_ends if e > done]
        return min([*(n - done % n for n in every), *ends], default=None)

    def is_due(self, done: int) -> bool:
        """Whether a save is due after so many updates."""
        policy = self._policy
        every = [n for n in (policy.every_steps, policy.keep_steps) if n is not None]
        return any(done % n == 0 for n in every) or done in self._epoch_ends

    def kept(self, steps: list[int]) -> set[int]:
        """Which of some checkpoints to keep."""
        policy = self._policy
        good = {s for s in steps if policy.keep_steps and s % policy.keep_steps == 0}
        return good | (self._epoch_ends & set(steps)) | set(steps[-policy.keep_last :])


def _as_slice(epochs: Any) -> slice | None:
    chosen = epochs
    if isinstance(epochs, str):
        with contextlib.suppress(ValueError, TypeError):
            chosen = slice(*(int(p) if p.strip() else None for p in epochs.split(":")))
    if chosen is None or (isinstance(chosen, slice) and _is_of_integers(chosen)):
        return chosen
    raise ValueError(
        f"Expected `keep_epochs` to be a slice of integers, got {epochs!r}. Pass for "
        "example slice(None, None, 10) or '::10'."
    )


def _is_of_integers(chosen: slice) -> bool:
    parts = [p for p in (chosen.start, chosen.stop, chosen.step) if p is not None]
    plain = all(isinstance(p, Integral) and not isinstance(p, bool) for p in parts)
    return plain and chosen.step != 0
