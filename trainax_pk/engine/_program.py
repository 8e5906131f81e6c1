"""The two families of programs: one update per dispatch, or many in one loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk.engine._feed import AbstractFeed
from trainax_pk.step import Info, TrainState

Step = Callable[[TrainState, PyTree[Array]], tuple[TrainState, Info]]


class Programs:
    """Compiled forms of one train step on one feed.

    Both families run the updates `start … start + count - 1` and return the state and
    the records `(size,)`, of which the first `count` are filled. The number of updates
    is an operand: chunks of any length up to `size` share one compilation.

    Attributes:
        num_traces: How often the train step was traced.
    """

    def __init__(
        self,
        step: Step,
        feed: AbstractFeed,
        rewrite: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self.num_traces = 0

        def update(state: TrainState, batch: PyTree[Array]) -> Any:
            self.num_traces += 1
            new, info = step(state, batch)
            # An optimizer may answer in a weak or wider type: a loop cannot carry that.
            new = jax.tree.map(
                lambda x, old: (
                    x
                    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
                    else jax.lax.convert_element_type(x, old.dtype)
                ),
                new,
                state,
            )
            return new, {"loss": info.loss, "grad_norm": info.grad_norm}

        self._feed = feed
        self._update = rewrite(update)
        self._scan = jax.jit(self._many, static_argnames="size")
        self._loop = jax.jit(self._one)
        self._executables: dict[Any, Any] = {}
        self._batch = jax.jit(lambda arrays, start, i: feed.single(arrays, start, i))

    def scan(
        self, state: TrainState, arrays: PyTree, start: int, count: int, size: int
    ) -> tuple[TrainState, PyTree[Array]]:
        """All updates in one dispatch."""
        return self._scan(state, arrays, np.int32(start), np.int32(count), size=size)

    def executable(self, state: TrainState, arrays: PyTree, size: int) -> Any:
        """What `scan` runs, `(state, arrays, start, count) -> ...`, for any thread."""
        leaves = jax.tree.leaves((state, arrays))
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        kind = (jax.tree.structure((state, arrays)), shapes, size)
        if kind not in self._executables:
            zero = np.int32(0)
            lowered = self._scan.lower(state, arrays, zero, zero, size=size)
            self._executables[kind] = lowered.compile()
        return self._executables[kind]

    def loop(
        self, state: TrainState, arrays: PyTree, start: int, count: int, size: int
    ) -> tuple[TrainState, PyTree[Array]]:
        """One update per dispatch."""
        records = _empty(size)
        first = np.int32(start)
        for i in range(count):
            state, records = self._loop(state, arrays, first, np.int32(i), records)
        return state, records

    def batch(self, arrays: PyTree, start: int, i: int) -> PyTree[Array]:
        """Batch of update `start + i`."""
        return self._batch(arrays, np.int32(start), np.int32(i))

    def jaxpr(self, state: TrainState, arrays: PyTree, size: int) -> Any:
        """The scan as a jaxpr, for inspection; running it does not trace again."""
        zero = np.int32(0)
        return self._scan.trace(state, arrays, zero, zero, size=size).jaxpr

    def _one(
        self, state: TrainState, arrays: PyTree, start: Array, i: Array, records: Any
    ) -> tuple[TrainState, PyTree[Array]]:
        batch = self._feed.single(arrays, start, i)
        state, record = self._update(state, batch)
        return state, _write(records, record, i)

    def _many(
        self, state: TrainState, arrays: PyTree, start: Array, count: Array, size: int
    ) -> tuple[TrainState, PyTree[Array]]:
        plan = self._feed.plan(arrays, start, count, size)

        def body(i: Array, carry: Any) -> Any:
            state, records = carry
            state, record = self._update(state, self._feed.pick(arrays, plan, i))
            records = _write(records, record, i)
            return state, records

        empty = _empty(size)
        return jax.lax.fori_loop(0, count, body, (state, empty))


def _empty(size: int) -> PyTree[Array]:
    return {"loss": jnp.zeros(size), "grad_norm": jnp.zeros(size)}


def _write(records: PyTree[Array], record: PyTree[Array], i: Array) -> PyTree[Array]:
    return jax.tree.map(lambda r, x: r.at[i].set(x.astype(r.dtype)), records, record)
