"""One update of an amortized density on one batch, without a trainer."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from trainax_pk.amortized._pairs import as_pairs


def amortized_nll_loss_fn(model: Any, batch: Any) -> Float[Array, ""]:
    """−(1/B) Σ_b log q: negative log-likelihood of a batch, in nats.

    Args:
        model: `log_prob(theta, x, mask)` of one sample: an `AmortizedPosterior`, an
            `AmortizedLikelihood`, or anything of that form.
        batch: `Pairs`, a tuple (theta, x) or (theta, x, mask), or a `Batch1D` or
            `Batch2D`, whose input is x and whose target is theta.

    Returns:
        Scalar.

    Raises:
        ValueError: As `as_pairs`, and shapes that the model does not take.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     tx.amortized.DiagonalGaussian(2, 3, key=jax.random.key(0)),
        ... )
        >>> pairs = (jnp.zeros((8, 2)), jnp.ones((8, 3)))
        >>> tx.amortized.amortized_nll_loss_fn(posterior, pairs).shape
        ()
    """
    check_method(model, "log_prob")
    theta, x, mask = as_pairs(batch)
    axes = (0, 0, None if mask is None else 0)
    return -jnp.mean(jax.vmap(model.log_prob, in_axes=axes)(theta, x, mask))


def amortized_train_step(
    model: PyTree[Any],
    batch: Any,
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
) -> tuple[PyTree[Any], optax.OptState, Float[Array, ""]]:
    """One update on `amortized_nll_loss_fn`.

    Pure; to be compiled with `eqx.filter_jit`. `tx.make_train_step` with
    `tx.configuration.AmortizedNLL` does the same with clipping, averages, accumulation
    and the rest.

    Args:
        model: As for `amortized_nll_loss_fn`; its inexact arrays are trained.
        batch: Likewise.
        optimizer: An optax transformation.
        opt_state: `optimizer.init(eqx.filter(model, eqx.is_inexact_array))`.

    Returns:
        Model, optimizer state, and the loss before the update.

    Raises:
        ValueError: As `amortized_nll_loss_fn`.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((4, 3), masked=True),
        ...     tx.amortized.DiagonalGaussian(12, 24, key=jax.random.key(0)),
        ...     prior=tx.data.Normal(jnp.zeros((4, 3)), 1.0),
        ... )
        >>> y = jnp.ones((8, 4, 3))
        >>> batch = tx.Batch1D(y, y, target=2 * y)
        >>> adam = optax.adam(1e-2)
        >>> opt_state = adam.init(eqx.filter(posterior, eqx.is_inexact_array))
        >>> step = eqx.filter_jit(tx.amortized.amortized_train_step)
        >>> losses = []
        >>> for _ in range(5):
        ...     posterior, opt_state, loss = step(posterior, batch, adam, opt_state)
        ...     losses.append(float(loss))
        >>> losses[-1] < losses[0]
        True
    """
    loss, grads = eqx.filter_value_and_grad(amortized_nll_loss_fn)(model, batch)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss


def check_method(model: Any, name: str) -> None:
    """A model that has a method, or a ValueError."""
    if not callable(getattr(model, name, None)):
        raise ValueError(
            f"Expected a model with `{name}`, got {type(model).__name__}. Pass one of "
            "tx.amortized or tx.generation, and no compute_dtype, which hides methods."
        )
