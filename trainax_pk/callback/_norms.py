"""Norms of the weights and of gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from trainax_pk._tree import as_int, global_norm_squared
from trainax_pk.callback._base import AbstractCallback, Context, check_callback
from trainax_pk.configuration import AbstractConfiguration
from trainax_pk.configuration._base import check_configuration
from trainax_pk.step import TrainState, stream_key


class WeightNorm(AbstractCallback):
    """Euclidean norm of all trained leaves.

    Attributes:
        every: Number of updates between records.
        name: Key in `history.records`.

    Raises:
        ValueError: `every` below 1, an empty name.

    Example:
        >>> from trainax_pk.callback import WeightNorm
        >>> WeightNorm(every=10).name
        'weight_norm'
    """

    every: int = eqx.field(static=True, converter=as_int)
    name: str = eqx.field(static=True, default="weight_norm")

    def __check_init__(self) -> None:
        check_callback(self.every, self.name)

    def __call__(self, context: Context) -> Float[Array, ""]:
        """‖θ‖₂."""
        return _norm(context.state.params)


class GradNorm(AbstractCallback):
    """Euclidean norm of a configuration's gradient on the batch of the next update.

    The norm of the training gradient itself costs nothing: it is `history.grad_norm`.

    Attributes:
        configuration: Whose gradient.
        every: Number of updates between records.
        name: Key in `history.records`.

    Raises:
        ValueError: `every` below 1, an empty name, no configuration.

    Example:
        >>> import trainax_pk as tx
        >>> five = tx.configuration.Supervised(5)
        >>> tx.callback.GradNorm(five, every=10).every
        10
    """

    configuration: AbstractConfiguration
    every: int = eqx.field(static=True, converter=as_int)
    name: str = eqx.field(static=True, default="grad_norm")

    def __check_init__(self) -> None:
        check_callback(self.every, self.name)
        check_configuration(self.configuration)

    def __call__(self, context: Context) -> Float[Array, ""]:
        """‖∂L/∂θ‖₂."""
        return _grad_norm(self.configuration, context.state, context.batch)


@jax.jit
def _norm(params: PyTree[Array]) -> Float[Array, ""]:
    return jnp.sqrt(global_norm_squared(params))


@eqx.filter_jit
def _grad_norm(
    configuration: AbstractConfiguration, state: TrainState, batch: PyTree[Array]
) -> Float[Array, ""]:
    key = stream_key(state.key, "evaluate", state.step)

    def loss(params: PyTree[Array]) -> Array:
        return configuration(state.model_with(params), batch, key=key)[0]

    return jnp.sqrt(global_norm_squared(jax.grad(loss)(state.params)))
