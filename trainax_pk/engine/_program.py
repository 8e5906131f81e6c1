"""The two families of programs: one update per dispatch, or many in one loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk.engine._feed import AbstractFeed
from trainax_pk.engine._rewrite import Transformation
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
        rewrite: Transformation,
        settle: Callable[[Any], Any] | None = None,
    ) -> None:
        self.num_traces = 0
        self._settle = settle or (lambda out: out)

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
        self._update = _for_members(update, rewrite)
        self._scan = jax.jit(self._many, static_argnames="size")
        self._loop = jax.jit(self._one)
        self._executables: dict[Any, Any] = {}
        self._mapped: dict[Any, Any] = {}
        self._batch = jax.jit(lambda arrays, start, i: feed.single(arrays, start, i))

    def scan(
        self, state: TrainState, arrays: PyTree, start: int, count: int, size: int
    ) -> tuple[TrainState, PyTree[Array]]:
        """All updates in one dispatch."""
        return self._scan(state, arrays, np.int32(start), np.int32(count), size=size)

    def executable(
        self, state: TrainState, arrays: PyTree, size: int, axes: PyTree | None = None
    ) -> Any:
        """What `scan` runs, `(state, arrays, start, count) -> ...`, for any thread.

        With `axes` (of `arrays`, as `jax.vmap` takes them) for members side by side.
        """
        leaves = jax.tree.leaves((state, arrays))
        shapes = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
        kind = (jax.tree.structure((state, arrays)), shapes, size, _hashable(axes))
        if kind not in self._executables:
            zero = np.int32(0)
            program = self._scan if axes is None else self._members("scan", axes)
            lowered = program.lower(state, arrays, zero, zero, size)
            self._executables[kind] = lowered.compile()
        return self._executables[kind]

    def members(
        self,
        family: str,
        axes: PyTree,
        state: TrainState,
        arrays: PyTree,
        start: int,
        count: int,
        size: int,
    ) -> tuple[TrainState, PyTree[Array]]:
        """Updates of all members in one program: leaves have a leading member axis, of
        `arrays` those that `axes` says."""
        program = self._members(family, axes)
        first = np.int32(start)
        if family == "scan":
            return program(state, arrays, first, np.int32(count), size)
        num = jax.tree.leaves(state)[0].shape[0]
        records = jax.tree.map(lambda x: jnp.zeros((num, *x.shape)), _empty(size))
        for i in range(count):
            state, records = program(state, arrays, first, np.int32(i), records)
        return state, records

    def _members(self, family: str, axes: PyTree) -> Any:
        kind = (family, _hashable(axes))
        if kind not in self._mapped:
            if family == "loop":
                mapped = jax.vmap(self._one, in_axes=(0, axes, None, None, 0))
                self._mapped[kind] = jax.jit(mapped)
            else:

                def many(s: Any, a: Any, start: Any, count: Any, size: int) -> Any:
                    run = lambda s, a: self._many(s, a, start, count, size)  # noqa: E731
                    return jax.vmap(run, in_axes=(0, axes))(s, a)

                self._mapped[kind] = jax.jit(many, static_argnames="size")
        return self._mapped[kind]

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
        return self._settle((state, _write(records, record, i)))

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
        return self._settle(jax.lax.fori_loop(0, count, body, (state, empty)))


def _for_members(update: Callable[..., Any], rewrite: Transformation) -> Any:
    """The update rewritten, and mapped over before that wherever it is mapped over.

    What is best for one member is not best for many: a rewrite has to see the sizes that
    the program has in the end.
    """
    alone = rewrite(update)
    if alone is update:
        return update
    mapped = jax.custom_batching.custom_vmap(alone)

    @mapped.def_vmap
    def _(axis_size: int, batched: Any, state: Any, batch: Any) -> Any:
        axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
        together = jax.vmap(update, in_axes=axes, axis_size=axis_size)
        out = rewrite(together)(state, batch)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _empty(size: int) -> PyTree[Array]:
    return {"loss": jnp.zeros(size), "grad_norm": jnp.zeros(size)}


def _hashable(axes: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(axes, is_leaf=lambda x: x is None)
    return (tuple(leaves), treedef)


def _write(records: PyTree[Array], record: PyTree[Array], i: Array) -> PyTree[Array]:
    return jax.tree.map(lambda r, x: r.at[i].set(x.astype(r.dtype)), records, record)
