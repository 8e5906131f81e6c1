"""Reduction of a batch to one number."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class BatchLoss(eqx.Module):
    """Marks a loss that sees the whole batch at once.

    For a reduction other than the mean over samples (sum, maximum, median), or for a
    loss that compares samples with each other. Everything else is a plain function of
    one sample.

    Attributes:
        fn: `(prediction_batch, target_batch) -> scalar`; leaves `(B, ...)`. The target
            may be None where the loss reduces a residuum.

    Raises:
        TypeError: If `fn` is not callable.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> worst = loss.BatchLoss(lambda p, t: jnp.max(jax.vmap(loss.mse)(p, t)))
        >>> p = jnp.array([[1.0, 1.0], [3.0, 3.0]])
        >>> float(loss.reduce_batch(worst, p)), float(loss.reduce_batch(loss.mse, p))
        (9.0, 5.0)
    """

    fn: Callable[..., Array]

    def __check_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(
                f"Expected a function (prediction_batch, target_batch) -> scalar, got "
                f"{type(self.fn).__name__}. Pass a callable."
            )

    def __call__(
        self, prediction_batch: PyTree[Array], target_batch: PyTree[Array] | None = None
    ) -> Float[Array, ""]:
        """Loss of the batch."""
        return self.fn(prediction_batch, target_batch)


def reduce_batch(
    loss: Callable[..., Array],
    prediction_batch: PyTree[Array],
    target_batch: PyTree[Array] | None = None,
) -> Float[Array, ""]:
    """One number for a batch: the mean of the samples' losses, or a `BatchLoss`'s own.

    Args:
        loss: Function of one sample `(prediction, target) -> scalar`, or a `BatchLoss`.
        prediction_batch: Leaves `(B, ...)`.
        target_batch: Leaves `(B, ...)`, or None, which is handed to the loss as it is.

    Returns:
        Scalar.

    Raises:
        TypeError: If `loss` is not callable.
        ValueError: If the leaves do not share one batch axis, or the loss does not
            return a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> p, t = jnp.array([[1.0], [4.0]]), jnp.array([[1.0], [2.0]])
        >>> float(loss.reduce_batch(loss.mse, p, t))
        2.0
    """
    if not callable(loss):
        raise TypeError(
            f"Expected a loss function, got {type(loss).__name__}. "
            "Pass for example `trainax_pk.loss.mse`, without calling it."
        )
    batch_size = _batch_size((prediction_batch, target_batch))
    if isinstance(loss, BatchLoss):
        value = loss(prediction_batch, target_batch)
        if jnp.shape(value) != ():
            raise ValueError(
                f"Expected a BatchLoss to return a scalar, got shape "
                f"{jnp.shape(value)}. Reduce the batch axis inside it."
            )
        return value
    values = jax.vmap(loss)(prediction_batch, target_batch)
    # A mean over whatever comes back would hide a loss that forgot to reduce.
    if jnp.shape(values) != (batch_size,):
        raise ValueError(
            f"Expected a loss that returns a scalar per sample, got shape "
            f"{jnp.shape(values)[1:]}. Reduce over channels and space inside the loss."
        )
    return jnp.mean(values)


def _batch_size(trees: Any) -> int:
    leaves = jax.tree.leaves(trees)
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"Expected leaves (B, ...) with one common batch size, got shapes "
            f"{[jnp.shape(leaf) for leaf in leaves]}. "
            "Give every leaf the same leading axis."
        )
    return sizes.pop()[0]
