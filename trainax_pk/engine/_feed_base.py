"""What a feed of batches has to offer."""

import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree


class AbstractFeed(eqx.Module):
    """Batches of a run, by the number of the update that uses them.

    To add one: subclass, implement `load`, which runs on the host before a program is
    dispatched, and `plan` and `pick`, which are traced into the program. The batch of an
    update must be a pure function of its number.
    """

    @abc.abstractmethod
    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        """Arrays that the program of updates `start … start + count - 1` reads, of
        shapes that depend on `size` >= `count` alone."""

    @abc.abstractmethod
    def plan(
        self, arrays: PyTree[Array], start: Array, count: Array, size: int
    ) -> PyTree[Array]:
        """What is computed once for `count` of at most `size` updates, traced."""

    @abc.abstractmethod
    def pick(self, arrays: PyTree[Array], plan: PyTree[Array], i: Array) -> PyTree:
        """Batch of the i-th update of a program of many updates, traced."""

    @abc.abstractmethod
    def single(self, arrays: PyTree[Array], start: Array, i: Array) -> PyTree[Array]:
        """Batch of update `start + i`, i-th of its chunk, on its own, traced."""


class AbstractChunkFeed(AbstractFeed):
    """A feed whose `load` gives the batches of a chunk, leaves `(size, B, ...)`.

    To add one: subclass, and implement `load`.
    """

    def plan(
        self, arrays: PyTree[Array], start: Array, count: Array, size: int
    ) -> None:
        """Nothing: the batches are already in order."""
        del arrays, start, count, size

    def pick(self, arrays: PyTree[Array], plan: PyTree[Array], i: Array) -> PyTree:
        """Batch of one update."""
        del plan
        return _row(arrays, i)

    def single(self, arrays: PyTree[Array], start: Array, i: Array) -> PyTree[Array]:
        """Batch of one update."""
        del start
        return _row(arrays, i)


def _row(arrays: PyTree[Array], i: Array) -> PyTree[Array]:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), arrays
    )


class AbstractBesideFeed(AbstractFeed):
    """Batches `(beside, batch)` of another feed; what lies beside is `load`'s second."""

    feed: eqx.AbstractVar[AbstractFeed]

    def plan(
        self, arrays: PyTree[Array], start: Array, count: Array, size: int
    ) -> PyTree[Array]:
        """The feed's plan."""
        return self.feed.plan(arrays[0], start, count, size)

    def pick(self, arrays: PyTree[Array], plan: PyTree[Array], i: Array) -> PyTree:
        """Batch of the i-th update."""
        return arrays[1], self.feed.pick(arrays[0], plan, i)

    def single(self, arrays: PyTree[Array], start: Array, i: Array) -> PyTree[Array]:
        """Batch of one update."""
        return arrays[1], self.feed.single(arrays[0], start, i)
