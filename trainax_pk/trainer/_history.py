"""What a training run reports."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Float, PyTree

from trainax_pk.checkpoint import Match
from trainax_pk.checkpoint._arrays import restore_leaf, to_host
from trainax_pk.engine import join_chunks
from trainax_pk.step import TrainState
from trainax_pk.trainer._results import as_result, check_like


class Record(eqx.Module):
    """What a callback returned over a run.

    Attributes:
        steps: Numbers of updates done when it ran.
        values: The results stacked, leaves `(len(steps), ...)`, on the device.
    """

    steps: tuple[int, ...] = eqx.field(static=True)
    values: PyTree[Any]

    def at(self, i: int) -> PyTree[Any]:
        """The i-th result, as the callback returned it."""
        return jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, self.values)


class History(eqx.Module):
    """What a training run reports; arrays stay on the device until they are asked for.

    Attributes:
        loss: Loss of each update, before it, `(num_training_steps,)`.
        grad_norm: Euclidean norm of each update's gradient, `(num_training_steps,)`.
        records: What the callbacks returned, by name.
        state: The whole training state after the last update.
        program: Which program family ran, and why.
        best: By a monitor's name or label, step and value of the best evaluation.
        start: What was taken over from another run, if anything was.
    """

    loss: Float[Array, " n"]
    grad_norm: Float[Array, " n"]
    records: dict[str, Record]
    state: TrainState
    program: str = eqx.field(static=True)
    best: dict[str, tuple[int, float]] = eqx.field(default_factory=dict)
    start: Match | None = eqx.field(static=True, default=None)


class StoredRecord(NamedTuple):
    """What a callback returned before a run was resumed.

    Attributes:
        steps: Numbers of updates done when it ran.
        leaves: Leaves of its results stacked, on the host; None for what is no array.
        paths: Where they stand in a result.
    """

    steps: tuple[int, ...]
    leaves: tuple[np.ndarray | None, ...]
    paths: tuple[str, ...]


class HistoryBuilder:
    """Collects chunks and callback results without a host round trip."""

    def __init__(self) -> None:
        self._chunks: list[PyTree[Array]] = []
        self._values: dict[str, list[PyTree[Any]]] = {}
        self._steps: dict[str, list[int]] = {}
        self._stored: dict[str, StoredRecord] = {}

    def add_chunk(self, records: PyTree[Array]) -> None:
        """Losses and gradient norms of a chunk."""
        self._chunks.append(records)

    def add_record(self, name: str, step: int, value: PyTree[Any]) -> PyTree[Any]:
        """Takes the result of a callback, and returns it as it is kept.

        Raises:
            ValueError: A result that does not fit the first.
        """
        value = as_result(name, value)
        held = self._values.setdefault(name, [])
        if held:
            check_like(name, step, value, held[0])
        held.append(value)
        self._steps.setdefault(name, []).append(step)
        return value

    def so_far(
        self, done: int
    ) -> tuple[list[PyTree[Array]], Callable[[], dict[str, StoredRecord]]]:
        """What was added of updates and callbacks before step `done`.

        Returns:
            The chunks, and a function that gathers the records on the host.
        """
        values = {
            name: [v for s, v in zip(self._steps[name], held, strict=True) if s < done]
            for name, held in self._values.items()
        }
        steps = {
            n: tuple(s for s in held if s < done) for n, held in self._steps.items()
        }
        stored = dict(self._stored)

        def gather() -> dict[str, StoredRecord]:
            fresh = {n: _gather(steps[n], v) for n, v in values.items() if v}
            return {
                **stored,
                **{n: _joined(stored.get(n), r) for n, r in fresh.items()},
            }

        return list(self._chunks), gather

    def restore(
        self, series: dict[str, np.ndarray], stored: dict[str, StoredRecord]
    ) -> None:
        """Takes up what another process gathered."""
        self._chunks = [{name: jnp.array(x) for name, x in series.items()}]
        self._stored = stored

    def lacks(self, name: str) -> bool:
        """Whether a callback has results, but none of this process to tell their form."""
        return name in self._stored and not self._values.get(name)

    def build(
        self,
        state: TrainState,
        program: str,
        forms: Mapping[str, PyTree[Any]],
        best: dict[str, tuple[int, float]],
        start: Match | None = None,
    ) -> History:
        """The history of all that was added.

        Args:
            state: Where training stands.
            program: What ran.
            forms: A result, to be left out, of each callback that `lacks` one.
            best: As in the history.
            start: As in the history.
        """
        if self._chunks:
            series = join_chunks(self._chunks)
        else:
            # Training ended before its first update.
            series = {"loss": jnp.zeros(0), "grad_norm": jnp.zeros(0)}
        records = {
            name: _with_stored(
                name,
                Record(tuple(self._steps[name]), _stack(values)),
                self._stored.get(name),
            )
            for name, values in self._values.items()
        }
        for name, value in forms.items():
            one = Record((-1,), _stack([as_result(name, value)]))
            one = _with_stored(name, one, self._stored[name])
            values = jax.tree.map(
                lambda x: x[:-1] if eqx.is_array(x) else x, one.values
            )
            records[name] = Record(one.steps[:-1], values)
        loss, grad_norm = series["loss"], series["grad_norm"]
        return History(loss, grad_norm, records, state, program, best, start)


def _gather(steps: tuple[int, ...], values: list[PyTree[Any]]) -> StoredRecord:
    """Results stacked leaf by leaf on the host."""
    columns = zip(*(jax.tree.leaves(v) for v in values), strict=True)
    leaves = [
        np.stack([to_host(x)[0] for x in column]) if eqx.is_array(column[0]) else None
        for column in columns
    ]
    paths = [jax.tree_util.keystr(p) for p, _ in tree_leaves_with_path(values[0])]
    return StoredRecord(steps, tuple(leaves), tuple(paths))


def _joined(old: StoredRecord | None, new: StoredRecord) -> StoredRecord:
    if old is None or not _fits(old, new.leaves):
        return new
    leaves = [
        None if a is None else np.concatenate([a, b])
        for a, b in zip(old.leaves, new.leaves, strict=True)
    ]
    return StoredRecord(old.steps + new.steps, tuple(leaves), new.paths)


def _with_stored(name: str, record: Record, stored: StoredRecord | None) -> Record:
    if stored is None:
        return record
    leaves, treedef = jax.tree.flatten(record.values)
    hosts = [to_host(x)[0] if eqx.is_array(x) else None for x in leaves]
    if not _fits(stored, hosts):
        warnings.warn(
            f"The callback {name!r} returns another form than before this run was "
            f"resumed; its results of the steps {list(stored.steps)} are left out.",
            RuntimeWarning,
            stacklevel=5,
        )
        return record
    joined = [
        x if old is None else jnp.concatenate([_as(restore_leaf(old, x), x), x])
        for old, x in zip(stored.leaves, leaves, strict=True)
    ]
    return Record(stored.steps + record.steps, treedef.unflatten(joined))


def _as(old: Array, new: Array) -> Array:
    """In the dtype of another; keys have one alone."""
    is_key = jax.dtypes.issubdtype(new.dtype, jax.dtypes.prng_key)
    return old if is_key else old.astype(new.dtype)


def _fits(stored: StoredRecord, leaves: Sequence[np.ndarray | None]) -> bool:
    """Whether results have the form of those of a callback as it is now."""
    shapes = [None if x is None else x.shape[1:] for x in stored.leaves]
    return shapes == [None if x is None else x.shape[1:] for x in leaves]


def _stack(values: list[PyTree[Any]]) -> PyTree[Any]:
    def stack(*leaves: Any) -> Any:
        return jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0]

    return jax.tree.map(stack, *values)
