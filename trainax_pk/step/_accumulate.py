"""Loss and gradient of a batch, whole or part by part."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk.configuration import Aux

LossFn = Callable[
    [PyTree[Array], eqx.nn.State | None, PyTree[Array], PRNGKeyArray],
    tuple[Array, Aux],
]


def mean_loss(
    loss_fn: LossFn,
    params: PyTree[Array],
    layers: eqx.nn.State | None,
    batch: PyTree[Array],
    key: PRNGKeyArray,
    parts: int,
) -> Array:
    """Loss of a batch alone, for line searches.

    Args:
        loss_fn: `(params, layers, batch, key) -> (loss, aux)`.
        params: What is differentiated.
        layers: State of the model's layers, or None.
        batch: Leaves `(B, ...)`.
        key: Key of the batch; each part gets its own.
        parts: Number of parts, a divisor of B.

    Returns:
        The mean of the parts' losses.
    """
    if parts == 1:
        return loss_fn(params, layers, batch, key)[0]
    xs = _split(batch, key, parts)
    losses = jax.lax.map(lambda x: loss_fn(params, layers, *x)[0], xs)
    return jnp.mean(losses)


def mean_value_and_grad(
    loss_fn: LossFn,
    params: PyTree[Array],
    layers: eqx.nn.State | None,
    batch: PyTree[Array],
    key: PRNGKeyArray,
    parts: int,
) -> tuple[Array, Aux, PyTree[Array]]:
    """Loss and gradient of a batch, the parts one after another.

    Args:
        loss_fn: As for `mean_loss`.
        params: As for `mean_loss`.
        layers: As for `mean_loss`; each part starts from what the one before left.
        batch: As for `mean_loss`.
        key: As for `mean_loss`.
        parts: As for `mean_loss`. Memory is that of one part.

    Returns:
        Means of loss, of what else is reported, and of the gradient.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (loss, aux), grads = value_and_grad(params, layers, batch, key)
        return loss, aux, grads
    xs = _split(batch, key, parts)

    def body(carry: Any, x: Any) -> Any:
        grads, layers = carry
        (loss, aux), new = value_and_grad(params, layers, *x)
        if aux.model_state is not None:
            layers = aux.model_state
        grads = jax.tree.map(jnp.add, grads, new)
        return (grads, layers), (loss, aux.time_losses, aux.parts)

    zeros = jax.tree.map(jnp.zeros_like, params)
    (grads, layers), reported = jax.lax.scan(body, (zeros, layers), xs)
    loss, time_losses, members = jax.tree.map(lambda x: jnp.mean(x, axis=0), reported)
    grads = jax.tree.map(lambda g: g / parts, grads)
    return loss, Aux(time_losses, layers, members), grads


def _split(batch: PyTree[Array], key: PRNGKeyArray, parts: int) -> Any:
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % parts:
        raise ValueError(
            f"Expected a batch size that `accumulate` ({parts}) divides, got {size}. "
            "Change one of the two."
        )
    # Every part takes samples from the whole batch, so that a batch that lies on
    # several devices stays there.
    split = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1),
        batch,
    )
    return split, jax.random.split(key, parts)
