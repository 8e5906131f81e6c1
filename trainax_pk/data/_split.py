"""Splits into training, validation and test data that share nothing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count
from trainax_pk.data._trajectories import Trajectories, as_trajectories


class Split(NamedTuple):
    """Three disjoint parts of one set of trajectories.

    Attributes:
        train: What is learned from.
        validation: What choices are made by.
        test: What is reported.
    """

    train: Trajectories
    validation: Trajectories
    test: Trajectories


def split_by_trajectory(
    trajectories: Trajectories | PyTree[Any],
    parts: Sequence[float] | Sequence[int] = (0.8, 0.1, 0.1),
    *,
    key: PRNGKeyArray,
) -> Split:
    """Whole trajectories, shuffled, into three parts. The data are copied once.

    Args:
        trajectories: `Trajectories`, or leaves `(num_samples, num_times, ...)`.
        parts: Three fractions (floats with sum 1; boundaries are rounded), or three
            counts of samples (ints; samples beyond their sum are left out).
        key: Determines the shuffle.

    Returns:
        `Split(train, validation, test)`.

    Raises:
        ValueError: Parts that are not three positive numbers of one kind, do not fit,
            or leave one part empty.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from trainax_pk.data import split_by_trajectory
        >>> split = split_by_trajectory(jnp.ones((20, 5, 1)), key=jax.random.key(0))
        >>> [part.num_samples for part in split]
        [16, 2, 2]
    """
    data = as_trajectories(trajectories)
    counts = _counts(parts, data.num_samples, "samples")
    shuffled = np.asarray(jax.random.permutation(key, data.num_samples))
    bounds = np.cumsum(counts)
    chosen = np.split(shuffled[: bounds[-1]], bounds[:-1])
    return Split(*(_take(data, rows) for rows in chosen))


def split_by_time(
    trajectories: Trajectories | PyTree[Any],
    parts: Sequence[float] | Sequence[int] = (0.8, 0.1, 0.1),
    *,
    guard: int,
) -> Split:
    """Early times to train on, later ones to validate, the last ones to test.

    train | guard | validation | guard | test. Each part is a set of shorter
    trajectories of the same samples, so that no window reaches into another part; the
    `guard` times between parts are dropped, because neighbouring states are nearly
    equal. A good guard is the correlation time of the trajectories, in steps.

    Args:
        trajectories: `Trajectories`, or leaves `(num_samples, num_times, ...)`.
        parts: Three fractions of the times without guards (floats with sum 1;
            boundaries are rounded), or three counts of times (ints; times beyond
            their sum are left out).
        guard: Times dropped between two parts, >= 0.

    Returns:
        `Split(train, validation, test)`. NumPy leaves are views.

    Raises:
        ValueError: Parts that are not three positive numbers of one kind, do not fit
            beside the guards, or leave one part empty; a negative guard.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import split_by_time
        >>> split = split_by_time(jnp.ones((3, 100, 1)), (70, 10, 10), guard=5)
        >>> [part.num_times for part in split]
        [70, 10, 10]
    """
    data = as_trajectories(trajectories)
    check_count("guard", guard, minimum=0)
    usable = data.num_times - 2 * guard
    if usable < 3:
        raise ValueError(
            f"Expected room for three parts and two guards of {guard} times, got "
            f"trajectories of {data.num_times} times. Pass a guard of at most "
            f"{max(0, (data.num_times - 3) // 2)}, or longer trajectories."
        )
    counts = _counts(parts, usable, f"times (of {data.num_times}, without guards)")
    starts = (0, counts[0] + guard, counts[0] + counts[1] + 2 * guard)
    return Split(
        *(
            _between(data, start, start + count)
            for start, count in zip(starts, counts, strict=True)
        )
    )


def _counts(parts: Any, total: int, what: str) -> tuple[int, int, int]:
    values = tuple(parts) if isinstance(parts, (Sequence, np.ndarray)) else ()
    whole = all(_is_integer(v) for v in values)
    real = all(isinstance(v, (float, np.floating)) for v in values)
    if len(values) != 3 or not (whole or real) or not all(v > 0 for v in values):
        raise ValueError(
            f"Expected three positive fractions or three positive counts, got {parts}. "
            "Pass floats such as (0.8, 0.1, 0.1) or ints, for training, validation "
            "and test."
        )
    if whole:
        counts = tuple(int(v) for v in values)
        if sum(counts) > total:
            raise ValueError(
                f"Expected counts with a sum of at most {total} {what}, got {counts} "
                f"with the sum {sum(counts)}. Pass smaller counts, or fractions."
            )
        return counts
    # A typo such as (0.8, 0.1, 0.01) is to be told from rounding.
    if abs(sum(values) - 1) > 1e-6:
        raise ValueError(
            f"Expected fractions with the sum 1, got {values} with the sum "
            f"{sum(values)}. Normalise them, or pass counts as ints."
        )
    bounds = np.rint(np.cumsum((0.0, *values)) * total).astype(int)
    counts = tuple(int(n) for n in np.diff(bounds))
    if min(counts) < 1:
        raise ValueError(
            f"Expected fractions that leave no part empty, got {counts} {what} from "
            f"{values} of {total}. Pass larger fractions, or counts as ints."
        )
    return counts


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _take(data: Trajectories, rows: np.ndarray) -> Trajectories:
    part = jax.tree.map(lambda x: x[rows], data)
    return Trajectories(part.state, part.sample, part.time, check_finite=False)


def _between(data: Trajectories, start: int, stop: int) -> Trajectories:
    def cut(x: Array) -> Array:
        return x[:, start:stop]

    state, time = jax.tree.map(cut, (data.state, data.time))
    return Trajectories(state, data.sample, time, check_finite=False)
