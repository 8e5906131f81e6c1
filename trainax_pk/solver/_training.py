"""One update of a solver on one batch, without a trainer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax
from jaxtyping import Array, Float, PyTree

from trainax_pk._batch import Batch, is_batch
from trainax_pk.solver._losses import reconstruction_loss

LossFn = Callable[[Any, Batch], Float[Array, ""]]


def train_loss_fn(model: Any, batch: Batch, **options: Any) -> Float[Array, ""]:
    """`reconstruction_loss` of a solver on a batch.

    Args:
        model: `batch -> states`, with a field or property `prior` where the loss asks
            for it.
        batch: A batch with a target.
        **options: Those of `reconstruction_loss`, other than the prior, which is the
            solver's.

    Returns:
        Scalar.

    Raises:
        ValueError: A batch without a target, or no batch; as `reconstruction_loss`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> y = jnp.ones((2, 5, 3))
        >>> fill = lambda batch: batch.observed()
        >>> batch = tx.Batch1D(y, jnp.zeros_like(y), target=2 * y)
        >>> float(tx.solver.train_loss_fn(fill, batch))
        4.0
    """
    check_target(batch)
    prior = getattr(model, "prior", None)
    return reconstruction_loss(model(batch), batch.target, prior=prior, **options)


def train_step(
    model: PyTree[Any],
    batch: Batch,
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    *,
    loss_fn: LossFn = train_loss_fn,
) -> tuple[PyTree[Any], optax.OptState, Float[Array, ""]]:
    """One update: loss, gradient through the solver's adjoint, optimizer.

    Pure; to be compiled with `eqx.filter_jit`. `tx.make_train_step` with
    `tx.configuration.Reconstruction` does the same with clipping, averages,
    accumulation and the rest.

    Args:
        model: Solver; its inexact arrays are trained.
        batch: A batch with a target.
        optimizer: An optax transformation.
        opt_state: `optimizer.init(eqx.filter(model, eqx.is_inexact_array))`.
        loss_fn: `(model, batch) -> scalar`.

    Returns:
        Model, optimizer state, and the loss before the update.

    Raises:
        ValueError: As `train_loss_fn`.

    Example:
        >>> import equinox as eqx
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import trainax_pk as tx
        >>> solver = tx.solver.FourDVarNet1D(
        ...     tx.solver.IdentityPrior(),
        ...     tx.solver.GradientDescent(0.1, learned=True), num_steps=2,
        ... )
        >>> y = jnp.ones((2, 5, 3))
        >>> batch = tx.Batch1D(y, y, target=y, initial=0 * y)
        >>> adam = optax.adam(0.1)
        >>> opt_state = adam.init(eqx.filter(solver, eqx.is_inexact_array))
        >>> step = eqx.filter_jit(tx.solver.train_step)
        >>> for _ in range(3):
        ...     solver, opt_state, loss = step(solver, batch, adam, opt_state)
        >>> bool(solver.modulator.step_size.value() > 0.1)  # x = y is the solution
        True
    """
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss


def eval_step(
    model: PyTree[Any], batch: Batch, *, loss_fn: LossFn = train_loss_fn
) -> Float[Array, ""]:
    """Loss of a batch, layers in inference mode.

    Args:
        model: Solver.
        batch: A batch with a target.
        loss_fn: `(model, batch) -> scalar`.

    Returns:
        Scalar.

    Raises:
        ValueError: As `train_loss_fn`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> y = jnp.ones((2, 5, 3))
        >>> fill = lambda batch: batch.observed()
        >>> float(tx.solver.eval_step(fill, tx.Batch1D(y, y, target=y)))
        0.0
    """
    return loss_fn(eqx.nn.inference_mode(model), batch)


def check_target(batch: Any) -> None:
    """A batch with a target, or a ValueError."""
    if not is_batch(batch):
        raise ValueError(
            f"Expected a Batch1D or Batch2D, got {type(batch).__name__}. Pass "
            "tx.Batch1D(input, mask, target)."
        )
    if batch.target is None:
        raise ValueError(
            "Expected a batch with a target to compare the reconstruction with, got "
            "None. Pass tx.Batch1D(input, mask, target), target the true states."
        )
