"""4DVarNet: a given number of modulated gradient steps on the variational cost."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
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
from trainax_pk.solver._cost import VariationalCost
from trainax_pk.solver._modulator import AbstractGradMod, check_modulator

_DIRECT = DirectAdjoint()


class FourDVarNet1D(eqx.Module):
    """Reconstructs states `(T, N)` from incomplete observations.

    x_{n+1} = x_n − δ_n for n < K, δ_n the modulated gradient of

        U(x) = w_o ‖m ⊙ (H(x) − y)‖² + w_p ‖x − Φ(x)‖²,

    from x_0 = `batch.initial`, or the observations with zeros in the gaps. Prior,
    modulator and (if learned) weights are trained together, through all K steps.

    `solver_adjoint` sets memory and kind of the parameters' gradient, never the
    result: all differentiate the same K steps.

    | adjoint | gradient | backward memory, in intermediates of a step |
    | --- | --- | --- |
    | `DirectAdjoint()` | exact | K |
    | `RecursiveCheckpointAdjoint()` | exact | 1, and K states |
    | `RecursiveCheckpointAdjoint(c)` | exact | 1, and c states |
    | `KStepAdjoint(k)`, `OneStepAdjoint()` | of the last k steps | k |

    Compute is K gradients of U and K steps of the modulator; the program's size does not
    depend on K.

    Attributes:
        cost: U.
        modulator: m.
        num_steps: K.
        solver_adjoint: How the steps are differentiated.

    Raises:
        ValueError: A prior or operator that is no function, no modulator, a count below
            1, an adjoint of another layer; when called, no `Batch1D`, shapes that do not
            fit.

    Source: Fablet et al. 2021, doi:10.1029/2021MS002572.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> keys = jax.random.split(jax.random.key(0))
        >>> solver = tx.solver.FourDVarNet1D(
        ...     tx.solver.BilinAEPrior1D(3, 4, key=keys[0]),
        ...     tx.solver.ConvLSTMGradMod1D(3, 4, key=keys[1]),
        ...     num_steps=5, solver_adjoint=tx.KStepAdjoint(2),
        ... )
        >>> y = jnp.ones((2, 20, 3)).at[:, ::2].set(jnp.nan)
        >>> solver(tx.Batch1D(y, ~jnp.isnan(y))).shape
        (2, 20, 3)
    """

    cost: VariationalCost
    modulator: AbstractGradMod
    num_steps: int = eqx.field(static=True)
    solver_adjoint: AbstractAdjoint = eqx.field(static=True)

    def __init__(
        self,
        prior: Callable[[Array], Array],
        modulator: AbstractGradMod,
        num_steps: int = 10,
        *,
        solver_adjoint: AbstractAdjoint | Any = _DIRECT,
        observation: Callable[[Array], Array] | None = None,
        observation_weight: float = 1.0,
        prior_weight: float = 1.0,
        learn_weights: bool = False,
    ) -> None:
        """Checks and keeps.

        Args:
            prior: Φ, any function of one state `(T, N)`.
            modulator: m.
            num_steps: K.
            solver_adjoint: How the K steps are differentiated.
            observation: H, a function of one state; None is the identity.
            observation_weight: w_o >= 0.
            prior_weight: w_p >= 0.
            learn_weights: Train w_o and w_p, kept positive.
        """
        self.cost = VariationalCost(
            prior,
            observation,
            observation_weight=observation_weight,
            prior_weight=prior_weight,
            learn_weights=learn_weights,
        )
        self.modulator, self.num_steps, self.solver_adjoint = _checked(
            modulator, num_steps, solver_adjoint
        )

    @property
    def prior(self) -> Callable[[Array], Array]:
        """Φ."""
        return self.cost.prior

    def __call__(self, batch: Batch1D) -> Float[Array, "B T N"]:
        """The reconstructed states."""
        return solve_4dvarnet_1d(
            batch,
            self.cost,
            self.modulator,
            self.num_steps,
            solver_adjoint=self.solver_adjoint,
        )


class FourDVarNet2D(eqx.Module):
    """Reconstructs states `(T, H, W)` from incomplete observations.

    See `FourDVarNet1D` for the equations and the adjoints.

    Attributes:
        cost: U.
        modulator: m.
        num_steps: K.
        solver_adjoint: How the steps are differentiated.

    Raises:
        ValueError: As `FourDVarNet1D`, with a `Batch2D`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> keys = jax.random.split(jax.random.key(0))
        >>> solver = tx.solver.FourDVarNet2D(
        ...     tx.solver.BilinAEPrior2D(5, 4, key=keys[0]),
        ...     tx.solver.ConvLSTMGradMod2D(5, 4, key=keys[1]),
        ...     num_steps=3,
        ... )
        >>> y = jnp.ones((1, 5, 8, 8))
        >>> solver(tx.Batch2D(y, y)).shape
        (1, 5, 8, 8)
    """

    cost: VariationalCost
    modulator: AbstractGradMod
    num_steps: int = eqx.field(static=True)
    solver_adjoint: AbstractAdjoint = eqx.field(static=True)

    def __init__(
        self,
        prior: Callable[[Array], Array],
        modulator: AbstractGradMod,
        num_steps: int = 10,
        *,
        solver_adjoint: AbstractAdjoint | Any = _DIRECT,
        observation: Callable[[Array], Array] | None = None,
        observation_weight: float = 1.0,
        prior_weight: float = 1.0,
        learn_weights: bool = False,
    ) -> None:
        """Checks and keeps.

        Args:
            prior: Φ, any function of one state `(T, H, W)`.
            modulator: m.
            num_steps: K.
            solver_adjoint: How the K steps are differentiated.
            observation: H, a function of one state; None is the identity.
            observation_weight: w_o >= 0.
            prior_weight: w_p >= 0.
            learn_weights: Train w_o and w_p, kept positive.
        """
        self.cost = VariationalCost(
            prior,
            observation,
            observation_weight=observation_weight,
            prior_weight=prior_weight,
            learn_weights=learn_weights,
        )
        self.modulator, self.num_steps, self.solver_adjoint = _checked(
            modulator, num_steps, solver_adjoint
        )

    @property
    def prior(self) -> Callable[[Array], Array]:
        """Φ."""
        return self.cost.prior

    def __call__(self, batch: Batch2D) -> Float[Array, "B T H W"]:
        """The reconstructed states."""
        return solve_4dvarnet_2d(
            batch,
            self.cost,
            self.modulator,
            self.num_steps,
            solver_adjoint=self.solver_adjoint,
        )


def solve_4dvarnet_1d(
    batch: Batch1D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
    *,
    solver_adjoint: AbstractAdjoint | Any = _DIRECT,
) -> Float[Array, "B T N"]:
    """K modulated gradient steps on the cost; the function behind `FourDVarNet1D`.

    Args:
        batch: Observations, mask, and where to start.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K.
        solver_adjoint: How the K steps are differentiated.

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
    return _solve(batch, cost, modulator, num_steps, solver_adjoint)


def solve_4dvarnet_2d(
    batch: Batch2D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
    *,
    solver_adjoint: AbstractAdjoint | Any = _DIRECT,
) -> Float[Array, "B T H W"]:
    """K modulated gradient steps on the cost; the function behind `FourDVarNet2D`.

    Args:
        batch: Observations, mask, and where to start.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K.
        solver_adjoint: How the K steps are differentiated.

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
    return _solve(batch, cost, modulator, num_steps, solver_adjoint)


def one_step_solve_4dvarnet_1d(
    batch: Batch1D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
) -> Float[Array, "B T N"]:
    """`solve_4dvarnet_1d` with the one-step gradient (Bolte et al., arXiv:2305.13768).

    Args:
        batch: As for `solve_4dvarnet_1d`.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K, of which the last has a gradient.

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
        batch, cost, modulator, num_steps, solver_adjoint=OneStepAdjoint()
    )


def one_step_solve_4dvarnet_2d(
    batch: Batch2D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    num_steps: int = 10,
) -> Float[Array, "B T H W"]:
    """`solve_4dvarnet_2d` with the one-step gradient (Bolte et al., arXiv:2305.13768).

    Args:
        batch: As for `solve_4dvarnet_2d`.
        cost: U.
        modulator: What makes steps of gradients.
        num_steps: K, of which the last has a gradient.

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
        batch, cost, modulator, num_steps, solver_adjoint=OneStepAdjoint()
    )


def _checked(modulator: Any, num_steps: Any, adjoint: Any) -> Any:
    check_modulator(modulator)
    return modulator, check_count("num_steps", num_steps), to_solver_adjoint(adjoint)


def _solve(
    batch: Any, cost: VariationalCost, modulator: Any, num_steps: int, adjoint: Any
) -> Array:
    modulator, num_steps, adjoint = _checked(modulator, num_steps, adjoint)
    y, x = batch.observed(), batch.start()

    def body(carry: Any) -> Any:
        x, memory = carry
        gradient = jax.vmap(cost.gradient)(x, y, batch.mask)
        step, memory = jax.vmap(modulator)(gradient, x, memory)
        return x - step, memory

    return iterate(adjoint, body, (x, jax.vmap(modulator.init)(x)), num_steps)[0]
