"""A given number of modulated gradient steps on the variational cost."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trainax_pk._batch import Batch1D, Batch2D, check_batch
from trainax_pk._tree import check_count
from trainax_pk.adjoint import (
    AbstractAdjoint,
    DirectAdjoint,
    OneStepAdjoint,
    iterate,
    to_solver_adjoint,
)
from trainax_pk.solver._cost import VariationalCost, backgrounds
from trainax_pk.solver._modulator import AbstractGradMod, check_modulator
from trainax_pk.solver._preconditioner import AbstractPreconditioner

_DIRECT = DirectAdjoint()


def solve_4dvarnet_1d(
    batch: Batch1D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
    *,
    solver_adjoint: AbstractAdjoint | Any = _DIRECT,
    preconditioner: AbstractPreconditioner | None = None,
) -> Float[Array, "B T N"]:
    """K modulated gradient steps on the cost; the function behind `FourDVarNet1D`.

    Args:
        batch: Observations, mask, and where to start.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K.
        solver_adjoint: How the K steps are differentiated.
        preconditioner: What makes directions of gradients.

    Returns:
        States, `(B, T, N)`.

    Raises:
        ValueError: As `FourDVarNet1D`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> batch = tx.Batch1D(jnp.full((1, 2, 1), 8.0), jnp.array([[[1], [0]]]))
        >>> cost = tx.solver.VariationalCost(lambda x: x[::-1])  # both times are equal
        >>> descent = tx.solver.GradientDescent(0.1)
        >>> x = tx.solver.solve_4dvarnet_1d(batch, cost, descent, 200)
        >>> [round(v, 3) for v in x[0, :, 0].tolist()]
        [8.0, 8.0]
    """
    check_batch(batch, Batch1D, "a 1D solver")
    return _solve(batch, cost, modulator, num_steps, solver_adjoint, preconditioner)


def solve_4dvarnet_2d(
    batch: Batch2D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
    *,
    solver_adjoint: AbstractAdjoint | Any = _DIRECT,
    preconditioner: AbstractPreconditioner | None = None,
) -> Float[Array, "B T H W"]:
    """K modulated gradient steps on the cost; the function behind `FourDVarNet2D`.

    Args:
        batch: Observations, mask, and where to start.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K.
        solver_adjoint: How the K steps are differentiated.
        preconditioner: What makes directions of gradients.

    Returns:
        States, `(B, T, H, W)`.

    Raises:
        ValueError: As `FourDVarNet2D`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> batch = tx.Batch2D(jnp.ones((1, 2, 4, 4)), jnp.ones((1, 2, 4, 4)))
        >>> cost = tx.solver.VariationalCost(tx.solver.IdentityPrior())
        >>> descent = tx.solver.GradientDescent(0.1)
        >>> tx.solver.solve_4dvarnet_2d(batch, cost, descent, 3).shape
        (1, 2, 4, 4)
    """
    check_batch(batch, Batch2D, "a 2D solver")
    return _solve(batch, cost, modulator, num_steps, solver_adjoint, preconditioner)


def one_step_solve_4dvarnet_1d(
    batch: Batch1D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
    *,
    preconditioner: AbstractPreconditioner | None = None,
) -> Float[Array, "B T N"]:
    """`solve_4dvarnet_1d` with the one-step gradient (Bolte et al., arXiv:2305.13768).

    Args:
        batch: As for `solve_4dvarnet_1d`.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K, of which the last has a gradient.
        preconditioner: What makes directions of gradients.

    Returns:
        States, `(B, T, N)`, those of `solve_4dvarnet_1d`.

    Raises:
        ValueError: As `FourDVarNet1D`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> batch = tx.Batch1D(jnp.ones((1, 4, 2)), jnp.ones((1, 4, 2)))
        >>> cost = tx.solver.VariationalCost(tx.solver.IdentityPrior())
        >>> descent = tx.solver.GradientDescent(0.1)
        >>> tx.solver.one_step_solve_4dvarnet_1d(batch, cost, descent).shape
        (1, 4, 2)
    """
    return solve_4dvarnet_1d(
        batch, cost, modulator, num_steps,
        solver_adjoint=OneStepAdjoint(), preconditioner=preconditioner,
    )  # fmt: skip


def one_step_solve_4dvarnet_2d(
    batch: Batch2D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
    *,
    preconditioner: AbstractPreconditioner | None = None,
) -> Float[Array, "B T H W"]:
    """`solve_4dvarnet_2d` with the one-step gradient (Bolte et al., arXiv:2305.13768).

    Args:
        batch: As for `solve_4dvarnet_2d`.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K, of which the last has a gradient.
        preconditioner: What makes directions of gradients.

    Returns:
        States, `(B, T, H, W)`, those of `solve_4dvarnet_2d`.

    Raises:
        ValueError: As `FourDVarNet2D`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> batch = tx.Batch2D(jnp.ones((1, 2, 4, 4)), jnp.ones((1, 2, 4, 4)))
        >>> cost = tx.solver.VariationalCost(tx.solver.IdentityPrior())
        >>> descent = tx.solver.GradientDescent(0.1)
        >>> tx.solver.one_step_solve_4dvarnet_2d(batch, cost, descent).shape
        (1, 2, 4, 4)
    """
    return solve_4dvarnet_2d(
        batch, cost, modulator, num_steps,
        solver_adjoint=OneStepAdjoint(), preconditioner=preconditioner,
    )  # fmt: skip


def checked_steps(
    cost: VariationalCost,
    modulator: Any,
    num_steps: Any,
    adjoint: Any,
    preconditioner: Any,
) -> tuple[int, AbstractAdjoint]:
    """K and its adjoint, or a ValueError for parts that do not go together."""
    check_modulator(modulator)
    check_count("num_steps", num_steps)
    if not isinstance(preconditioner, AbstractPreconditioner | None):
        raise ValueError(
            f"Expected `preconditioner` to be a preconditioner or None, got "
            f"{preconditioner!r}. Pass for example tx.solver.GaussNewton()."
        )
    lengths = {"weights": cost.num_steps, "damping": None}
    if preconditioner is not None:
        lengths["damping"] = preconditioner.num_steps
    for name, length in lengths.items():
        if length not in (None, num_steps):
            raise ValueError(
                f"Expected {name} for each of num_steps = {num_steps} steps, got "
                f"{length} numbers. Pass one number, or {num_steps}."
            )
    return num_steps, to_solver_adjoint(adjoint)


def _solve(
    batch: Any,
    cost: VariationalCost,
    modulator: Any,
    num_steps: int,
    adjoint: Any,
    preconditioner: AbstractPreconditioner | None,
) -> Array:
    num_steps, adjoint = checked_steps(
        cost, modulator, num_steps, adjoint, preconditioner
    )
    y, x = batch.observed(), batch.start()
    each = backgrounds(cost, batch)

    def body(carry: Any) -> Any:
        n, x, memory = carry
        here = cost.at(n)
        window = x, y, batch.mask

        def gradient_of(x: Array, y: Array, mask: Array, *background: Array) -> Array:
            return (here.about(*background) if background else here).gradient(
                x, y, mask
            )

        gradient = jax.vmap(gradient_of)(*window, *each)
        if preconditioner is not None:
            gradient = preconditioner.at(n).directions(gradient, here, *window, *each)
        step, memory = jax.vmap(modulator)(gradient, x, memory)
        return n + 1, x - step, memory

    start = jnp.zeros((), jnp.int32), x, jax.vmap(modulator.init)(x)
    return iterate(adjoint, body, start, num_steps)[1]
