"""What a training run reports."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from trainax_pk.step import TrainState


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
    """

    loss: Float[Array, " n"]
    grad_norm: Float[Array, " n"]
    records: dict[str, Record]
    state: TrainState
    program: str = eqx.field(static=True)


class HistoryBuilder:
    """Collects chunks and callback results without a host round trip."""

    def __init__(self) -> None:
        self._chunks: list[PyTree[Array]] = []
        self._values: dict[str, list[PyTree[Any]]] = {}
        self._steps: dict[str, list[int]] = {}

    def add_chunk(self, records: PyTree[Array]) -> None:
        """Losses and gradient norms of a chunk."""
        self._chunks.append(records)

    def add_record(self, name: str, step: int, value: PyTree[Any]) -> None:
        """Result of a callback."""
        self._values.setdefault(name, []).append(value)
        self._steps.setdefault(name, []).append(step)

    def build(self, state: TrainState, program: str) -> History:
        """The history of all that was added."""
        series = jax.tree.map(lambda *x: jnp.concatenate(x), *self._chunks)
        records = {
            name: Record(tuple(self._steps[name]), _stack(values))
            for name, values in self._values.items()
        }
        return History(series["loss"], series["grad_norm"], records, state, program)


def _stack(values: list[PyTree[Any]]) -> PyTree[Any]:
    def stack(*leaves: Any) -> Any:
        if all(isinstance(x, int | float | np.generic | np.ndarray) for x in leaves):
            return jnp.asarray(np.stack(leaves))
        return jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0]

    return jax.tree.map(stack, *values)
