"""trainax's losses: modules that compare one sample or a batch."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trainax_pk.loss import mae, mse, nmae, nmse


class BaseLoss(eqx.Module):
    """A loss of one sample and its reduction over a batch.

    To add one: subclass and implement `single_batch`.

    Attributes:
        batch_reduction: From the losses of the samples, `(B,)`, to a scalar.
    """

    batch_reduction: Callable[..., Array]

    def __init__(self, *, batch_reduction: Callable[..., Array] = jnp.mean) -> None:
        self.batch_reduction = batch_reduction

    @abc.abstractmethod
    def single_batch(self, prediction: Any, target: Any | None = None) -> Array:
        """Loss of one sample, `(channels, ...)`."""

    def multi_batch(self, prediction: Any, target: Any | None = None) -> Array:
        """Loss of a batch, `(B, channels, ...)`."""
        axes = (0, None if target is None else 0)
        losses = jax.vmap(self.single_batch, in_axes=axes)(prediction, target)
        return self.batch_reduction(losses)

    def __call__(self, prediction: Any, target: Any | None = None) -> Array:
        """As `multi_batch`."""
        return self.multi_batch(prediction, target)


class MSELoss(BaseLoss):
    """Mean squared error.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.compat.loss import MSELoss
        >>> MSELoss()(jnp.ones((4, 1, 8)), 3 * jnp.ones((4, 1, 8)))
        Array(4., dtype=float32)
    """

    def single_batch(
        self, prediction: Any, target: Any | None = None
    ) -> Float[Array, ""]:
        """Mean of the squared difference over all entries."""
        return mse(prediction, target)


class Normalized_MSELoss(MSELoss):
    """Mean squared error over the mean square of the target.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.compat.loss import Normalized_MSELoss
        >>> Normalized_MSELoss()(jnp.ones((4, 1, 8)), 2 * jnp.ones((4, 1, 8)))
        Array(0.25, dtype=float32)
    """

    def single_batch(self, prediction: Any, target: Any) -> Float[Array, ""]:
        """Mean of the squared difference over that of the squared target."""
        return nmse(prediction, target)


class MAELoss(BaseLoss):
    """Mean absolute error.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.compat.loss import MAELoss
        >>> MAELoss()(jnp.ones((4, 1, 8)), 3 * jnp.ones((4, 1, 8)))
        Array(2., dtype=float32)
    """

    def single_batch(
        self, prediction: Any, target: Any | None = None
    ) -> Float[Array, ""]:
        """Mean of the absolute difference over all entries."""
        return mae(prediction, target)


class Normalized_MAELoss(MAELoss):
    """Mean absolute error over the mean absolute target.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.compat.loss import Normalized_MAELoss
        >>> Normalized_MAELoss()(jnp.ones((4, 1, 8)), 2 * jnp.ones((4, 1, 8)))
        Array(0.5, dtype=float32)
    """

    def single_batch(self, prediction: Any, target: Any) -> Float[Array, ""]:
        """Mean of the absolute difference over that of the absolute target."""
        return nmae(prediction, target)


__all__ = ["BaseLoss", "MAELoss", "MSELoss", "Normalized_MAELoss", "Normalized_MSELoss"]
