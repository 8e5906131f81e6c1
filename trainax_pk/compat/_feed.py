"""Batches of a trainax trainer for the engine."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from trainax_pk.engine import AbstractFeed


class StackerFeed(AbstractFeed):
    """Batches `(captured, trainer's arrays, windows)` from a `TrajectorySubStacker`.

    The arrays that the update reads beside its windows (those of the reference stepper,
    weights of the loss) come with every batch: captured by the compiled program they
    would be constants, and could not be mapped over.

    Attributes:
        trainer: The trainer; its stacker gives the windows.
        captured: Other arrays that the update reads.
    """

    trainer: Any
    captured: PyTree[Array]

    def trainer_with(self, arrays: PyTree[Array]) -> Any:
        """The trainer with the arrays of a batch, without its trajectories."""
        return eqx.combine(arrays, eqx.filter(self.trainer, eqx.is_array, inverse=True))

    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        """Trajectories, order, the trainer's other arrays, and what is captured."""
        del start, count, size
        stacker = self.trainer.trajectory_sub_stacker
        rest = eqx.tree_at(lambda t: t.trajectory_sub_stacker, self.trainer, None)
        parts = (stacker, order, rest, self.captured)
        return tuple(eqx.filter(x, eqx.is_array) for x in parts)

    def plan(
        self, arrays: PyTree[Array], start: Array, count: Array, size: int
    ) -> Array:
        """Indices of windows of `size` updates."""
        del count
        return arrays[1].indices(start, size)

    def pick(self, arrays: PyTree[Array], plan: PyTree[Array], i: Array) -> PyTree:
        """Batch of one update of many."""
        indices = jax.lax.dynamic_index_in_dim(plan, i, keepdims=False)
        return self._batch(arrays, indices)

    def single(self, arrays: PyTree[Array], start: Array, i: Array) -> PyTree[Array]:
        """Batch of one update."""
        return self._batch(arrays, arrays[1].indices(start + i, 1)[0])

    def _batch(self, arrays: PyTree[Array], indices: Array) -> PyTree[Array]:
        static = eqx.filter(
            self.trainer.trajectory_sub_stacker, eqx.is_array, inverse=True
        )
        windows = eqx.combine(arrays[0], static).windows(indices)
        return arrays[3], arrays[2], windows
