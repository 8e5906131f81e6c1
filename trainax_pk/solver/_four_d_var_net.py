"""4DVarNet: a trained solver of the variational cost."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from trainax_pk._batch import Batch1D, Batch2D
from trainax_pk.adjoint import AbstractAdjoint, DirectAdjoint
from trainax_pk.solver._cost import VariationalCost
from trainax_pk.solver._modulated_steps import (
    checked_steps,
    solve_4dvarnet_1d,
    solve_4dvarnet_2d,
)
from trainax_pk.solver._modulator import AbstractGradMod
from trainax_pk.solver._preconditioner import AbstractPreconditioner

_DIRECT = DirectAdjoint()


class FourDVarNet1D(eqx.Module):
    """Reconstructs states `(T, N)` from incomplete observations.

    x_{n+1} = x_n − δ_n for n < K, δ_n the modulated gradient of

        U(x) = w_o ‖m ⊙ (H(x) − y)‖² + w_p ‖x − Φ(x)‖²,

    from x_0 = `batch.initial`, or the observations with zeros in the gaps. Prior,
    modulator and (if learned) weights are trained together, through all K steps.

    With a `background_weight` w_b, U has the term w_b ‖x(0) − x_0(0)‖² as well: the
    window's first state stays near that of `batch.initial`, which then is needed, be it
    a forecast or the estimate of a network. Where a window begins unobserved little else
    is known of it.

    With a `preconditioner` the modulator sees its direction d in place of ∇U, such as
    that of Gauss and Newton; weights may be given for each step, from a cost that is
    smooth to the one that is meant. Both pay where errors grow, as over long windows of
    chaotic models.

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
        preconditioner: What makes directions of gradients, or None.

    Raises:
        ValueError: A prior or operator that is no function, no modulator, a count below
            1, an adjoint of another layer; when called, no `Batch1D`, shapes that do not
            fit, a background weight without `batch.initial`.

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
    preconditioner: AbstractPreconditioner | None

    def __init__(
        self,
        prior: Callable[[Array], Array],
        modulator: AbstractGradMod,
        num_steps: int = 10,
        *,
        solver_adjoint: AbstractAdjoint | Any = _DIRECT,
        preconditioner: AbstractPreconditioner | None = None,
        observation: Callable[[Array], Array] | None = None,
        observation_weight: float | Sequence[float] = 1.0,
        prior_weight: float | Sequence[float] = 1.0,
        background_weight: float | Sequence[float] = 0.0,
        learn_weights: bool = False,
    ) -> None:
        """Checks and keeps.

        Args:
            prior: Φ, any function of one state `(T, N)`.
            modulator: m.
            num_steps: K.
            solver_adjoint: How the K steps are differentiated.
            preconditioner: What makes directions of gradients, such as
                `GaussNewton()`; None hands on the gradients.
            observation: H, a function of one state; None is the identity.
            observation_weight: w_o >= 0, or K positive numbers.
            prior_weight: w_p >= 0, or K positive numbers.
            background_weight: w_b >= 0, or K positive numbers.
            learn_weights: Train the weights, kept positive.
        """
        self.cost = VariationalCost(
            prior,
            observation,
            observation_weight=observation_weight,
            prior_weight=prior_weight,
            background_weight=background_weight,
            learn_weights=learn_weights,
        )
        self.modulator, self.preconditioner = modulator, preconditioner
        self.num_steps, self.solver_adjoint = checked_steps(
            self.cost, modulator, num_steps, solver_adjoint, preconditioner
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
            preconditioner=self.preconditioner,
        )


class FourDVarNet2D(eqx.Module):
    """Reconstructs states `(T, H, W)` from incomplete observations.

    See `FourDVarNet1D` for the equations and the adjoints.

    Attributes:
        cost: U.
        modulator: m.
        num_steps: K.
        solver_adjoint: How the steps are differentiated.
        preconditioner: What makes directions of gradients, or None.

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
    preconditioner: AbstractPreconditioner | None

    def __init__(
        self,
        prior: Callable[[Array], Array],
        modulator: AbstractGradMod,
        num_steps: int = 10,
        *,
        solver_adjoint: AbstractAdjoint | Any = _DIRECT,
        preconditioner: AbstractPreconditioner | None = None,
        observation: Callable[[Array], Array] | None = None,
        observation_weight: float | Sequence[float] = 1.0,
        prior_weight: float | Sequence[float] = 1.0,
        background_weight: float | Sequence[float] = 0.0,
        learn_weights: bool = False,
    ) -> None:
        """Checks and keeps.

        Args:
            prior: Φ, any function of one state `(T, H, W)`.
            modulator: m.
            num_steps: K.
            solver_adjoint: How the K steps are differentiated.
            preconditioner: What makes directions of gradients, such as
                `GaussNewton()`; None hands on the gradients.
            observation: H, a function of one state; None is the identity.
            observation_weight: w_o >= 0, or K positive numbers.
            prior_weight: w_p >= 0, or K positive numbers.
            background_weight: w_b >= 0, or K positive numbers.
            learn_weights: Train the weights, kept positive.
        """
        self.cost = VariationalCost(
            prior,
            observation,
            observation_weight=observation_weight,
            prior_weight=prior_weight,
            background_weight=background_weight,
            learn_weights=learn_weights,
        )
        self.modulator, self.preconditioner = modulator, preconditioner
        self.num_steps, self.solver_adjoint = checked_steps(
            self.cost, modulator, num_steps, solver_adjoint, preconditioner
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
            preconditioner=self.preconditioner,
        )
