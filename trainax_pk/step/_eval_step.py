"""Evaluation as a pure function."""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, PyTree

from trainax_pk._tree import check_average
from trainax_pk.configuration import AbstractConfiguration, Aux
from trainax_pk.configuration._base import check_configuration
from trainax_pk.step._keys import stream_key
from trainax_pk.step._state import TrainState


def make_eval_step(
    configuration: AbstractConfiguration, *, use_ema: bool | int = False
) -> Callable[[TrainState, PyTree[Array]], tuple[Array, Aux]]:
    """A pure function `(TrainState, batch) -> (loss, aux)` that changes nothing.

    Layers run in inference mode (dropout off, batch norm with running statistics), and
    noise comes from a stream of its own.

    Args:
        configuration: What is evaluated; curricula count at full length.
        use_ema: Evaluate the moving average of the model; of several the one of this
            number, counted from 1.

    Returns:
        The step.

    Raises:
        ValueError: No configuration; when called, a state without moving average.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import trainax_pk as tx
        >>> model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        >>> state = tx.TrainState.create(model, optax.sgd(1.0), key=jax.random.key(1))
        >>> evaluate = tx.make_eval_step(tx.configuration.Supervised())
        >>> evaluate(state, jnp.ones((8, 2, 2)))[0].shape
        ()
    """
    check_configuration(configuration)
    check_average(use_ema)

    def evaluate(state: TrainState, batch: PyTree[Array]) -> tuple[Array, Aux]:
        model = state.averaged_model(int(use_ema)) if use_ema else state.model
        model = eqx.nn.inference_mode(model)
        key = stream_key(state.key, "evaluate", state.step)
        return configuration(model, batch, key=key)

    return evaluate
