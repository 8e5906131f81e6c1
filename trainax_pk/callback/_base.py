"""What a callback is."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from trainax_pk._tree import check_count
from trainax_pk.step import TrainState


class Context:
    """What a callback sees.

    Attributes:
        step: Number of updates done, a Python int.
        state: The whole training state.
        poll: Called now and then by evaluations that take long: ends the run where a
            signal asks for it. None where nobody listens.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import optax
        >>> import trainax_pk as tx
        >>> model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        >>> state = tx.TrainState.create(model, optax.sgd(1.0), key=jax.random.key(1))
        >>> tx.callback.Context(0, state, lambda: None).model.weight.shape
        (2, 2)
    """

    def __init__(
        self,
        step: int,
        state: TrainState,
        batch: Callable[[], PyTree[Array]],
        poll: Callable[[], None] | None = None,
    ) -> None:
        self.step = step
        self.state = state
        self.poll = poll
        self._batch = batch

    @property
    def model(self) -> PyTree[Any]:
        """The model as it stands."""
        return self.state.model

    @property
    def batch(self) -> PyTree[Array]:
        """The batch of the next update, gathered when asked for."""
        return self._batch()


class AbstractCallback(eqx.Module):
    """Looks at training every so many updates; never changes it.

    A callback runs before the first update, after every `every` updates and after the
    last. What it returns is stacked into `history.records[name]`.

    To add one: subclass, declare `every` and `name` and what else it needs as fields,
    and implement `__call__` (jitted with `eqx.filter_jit` where it computes). Add it to
    the callbacks of `tests/test_trainer.py`. For a one-off, wrap a function in
    `Function`.
    """

    every: eqx.AbstractVar[int]
    name: eqx.AbstractVar[str]

    @abc.abstractmethod
    def __call__(self, context: Context) -> PyTree[Any]:
        """What is recorded: a PyTree of numbers and arrays.

        Structure, shapes and dtypes are the same every time; training ends with a
        ValueError at the first result that differs.
        """


def check_callback(every: Any, name: Any) -> int:
    """Fields that every callback has; the first of them."""
    every = check_count("every", every)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"Expected `name` to be a non-empty string, got {name!r}. It is the key in "
            "history.records."
        )
    return every
