"""Solves to convergence, with derivatives of the solution instead of the iterates."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from trainax_pk._batch import Batch1D, Batch2D, check_batch
from trainax_pk._tree import check_count, check_flag
from trainax_pk.solver._cost import VariationalCost, backgrounds
from trainax_pk.solver._modulator import (
    AbstractGradMod,
    GradientDescent,
    check_modulator,
)


class FixedPoint(eqx.Module):
    """Solutions of a batch, and how well each of them was reached.

    Attributes:
        state: x⋆, `(B, T, ...)`.
        num_steps: Steps taken, `(B,)`.
        residual: max |T(x⋆) − x⋆|, `(B,)`: the length of the step not taken; infinite
            where the iteration blew up.
        converged: Whether the tolerance was met within `max_steps`, `(B,)`.
    """

    state: Float[Array, "B T ..."]
    num_steps: Int[Array, " B"]
    residual: Float[Array, " B"]
    converged: Bool[Array, " B"]


def solve_4dvarnet_1d_fixedpoint(
    batch: Batch1D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    linear_solver: lx.AbstractLinearSolver | None = None,
    throw: bool = True,
) -> FixedPoint:
    """Iterates x ← T(x) = x − δ(∇U(x), x) until it stands still, sample by sample.

    The derivative is that of the solution, by the implicit function theorem: from
    x⋆ = T(x⋆, θ), dx⋆/dθ = (1 − ∂T/∂x)⁻¹ ∂T/∂θ, with a linear solve that applies
    ∂T/∂x and never forms it. Memory is that of one step whatever the number of steps,
    and `batch.initial` has no influence on x⋆ or its derivative, unless its first state
    is the background of a cost with a `background_weight`: then x⋆ has a derivative in
    it as in any other data.

    The modulator must have no state: `GradientDescent`, or
    `MLPGradMod(normalise=False)`, whose fixed points are those of the cost, ∇U = 0.
    Other rules have fixed points only if trained to.

    Args:
        batch: Observations, mask, and where to start.
        cost: U; of weights that change from step to step, the last.
        modulator: What makes steps of gradients.
        rtol: A sample has converged when |T(x) − x| <= atol + rtol |x| in every entry.
        atol: See `rtol`.
        max_steps: The most steps.
        linear_solver: A matrix-free solver of lineax. By default conjugate gradients
            for gradient descent, whose ∂T/∂x is symmetric, and GMRES for others.
        throw: Raise where a sample does not converge. Otherwise read
            `FixedPoint.converged`; derivatives mean nothing for those that have not.

    Returns:
        States, steps, residuals and flags.

    Raises:
        ValueError: No `Batch1D`, a modulator with a state, a tolerance that is not
            positive, a count below 1.
        RuntimeError: At run time: an iteration that does not contract, or that needs
            more steps; a linear solve that fails.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> batch = tx.Batch1D(jnp.full((1, 1, 1), 6.0), jnp.ones((1, 1, 1)))
        >>> def solution(w):  # U = (x - 6)² + (x - w x)² has its minimum at 3 for w = 0
        ...     cost = tx.solver.VariationalCost(lambda x: w * x)
        ...     descent = tx.solver.GradientDescent(0.2)
        ...     out = tx.solver.solve_4dvarnet_1d_fixedpoint(batch, cost, descent)
        ...     return out.state.sum()
        >>> x, slope = jax.value_and_grad(solution)(0.0)
        >>> round(float(x), 3), round(float(slope), 3)
        (3.0, 3.0)
    """
    check_batch(batch, Batch1D, "a 1D solver")
    return _solve(batch, cost, modulator, (rtol, atol, max_steps), linear_solver, throw)


def solve_4dvarnet_2d_fixedpoint(
    batch: Batch2D,
    cost: VariationalCost,
    modulator: AbstractGradMod,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    linear_solver: lx.AbstractLinearSolver | None = None,
    throw: bool = True,
) -> FixedPoint:
    """`solve_4dvarnet_1d_fixedpoint` for states `(T, H, W)`.

    Args:
        batch: Observations, mask, and where to start.
        cost: U.
        modulator: What makes steps of gradients, without a state.
        rtol: As in 1D.
        atol: As in 1D.
        max_steps: The most steps.
        linear_solver: As in 1D.
        throw: Raise where a sample does not converge.

    Returns:
        States, steps, residuals and flags.

    Raises:
        ValueError: As in 1D, for what is no `Batch2D`.
        RuntimeError: As in 1D.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> y = jnp.ones((1, 2, 4, 4))
        >>> cost = tx.solver.VariationalCost(tx.solver.IdentityPrior())
        >>> out = tx.solver.solve_4dvarnet_2d_fixedpoint(
        ...     tx.Batch2D(y, y, initial=0 * y), cost, tx.solver.GradientDescent(0.4)
        ... )
        >>> bool(out.converged[0]), round(float(out.state.mean()), 4)
        (True, 1.0)
    """
    check_batch(batch, Batch2D, "a 2D solver")
    return _solve(batch, cost, modulator, (rtol, atol, max_steps), linear_solver, throw)


def _solve(
    batch: Any,
    cost: VariationalCost,
    modulator: Any,
    limits: tuple[float, float, int],
    linear_solver: Any,
    throw: bool,  # noqa: FBT001
) -> FixedPoint:
    rtol, atol, max_steps = limits
    _check(modulator, rtol, atol, max_steps, throw)
    y, start = batch.observed(), batch.start()
    _check_stateless(modulator, start)
    symmetric = isinstance(modulator, GradientDescent)
    if linear_solver is None:
        # As exact as the solution: a better answer would be one to another question.
        kind = lx.CG if symmetric else lx.GMRES
        linear_solver = _Scaled(kind(rtol=rtol, atol=rtol))
    # Of T − 1, which for gradient descent is −η ∇²U; where the iteration contracts, the
    # Hessian is positive.
    tags = frozenset({lx.negative_semidefinite_tag} if symmetric else ())
    adjoint = optx.ImplicitAdjoint(linear_solver)
    solver = optx.FixedPointIteration(rtol=rtol, atol=atol)

    def one(x: Array, y: Array, mask: Array, *background: Array) -> FixedPoint:
        # Everything is closed over: a prior may hold arrays that are no leaves of it.
        here = cost.about(*background) if background else cost

        def advance(x: Array, args: None) -> Array:
            step, _ = modulator(here.gradient(x, y, mask), x, None)
            return x - step

        found = optx.fixed_point(
            advance, solver, x, max_steps=max_steps, adjoint=adjoint, tags=tags,
            throw=False,
        )  # fmt: skip
        x = jax.lax.stop_gradient(found.value)
        residual = jax.lax.stop_gradient(jnp.max(jnp.abs(advance(x, None) - x)))
        # What has blown up is far from a solution, and compares as such.
        residual = jnp.where(jnp.isnan(residual), jnp.inf, residual)
        return FixedPoint(
            found.value,
            found.stats["num_steps"],
            residual,
            found.result == optx.RESULTS.successful,
        )

    out = jax.vmap(one)(start, y, batch.mask, *backgrounds(cost, batch))
    if not throw:
        return out
    state = eqx.error_if(
        out.state,
        ~out.converged,
        "Expected every sample's iteration to reach a fixed point, and some did not: "
        f"their steps do not shrink below {rtol=}, {atol=} within {max_steps=}. Lower "
        "the step size if it does not contract (below 2 / L, L the largest eigenvalue of "
        "the cost's Hessian), raise max_steps or the tolerances if it is slow; "
        "throw=False returns steps, residuals and flags of all samples.",
    )
    return eqx.tree_at(lambda f: f.state, out, state)


class _Scaled(lx.AbstractLinearSolver):
    """Another solver on vectors of largest entry 1: its tolerances become relative.

    Cotangents of a mean over a batch can be smaller than any absolute tolerance.
    """

    solver: lx.AbstractLinearSolver

    def init(self, operator: Any, options: dict[str, Any]) -> Any:
        return self.solver.init(operator, options)

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> Any:
        largest = jnp.max(jnp.abs(vector))
        unit = jnp.where(largest > 0, largest, jnp.ones((), vector.dtype))
        out, result, stats = self.solver.compute(state, vector / unit, options)
        return out * unit, result, stats

    def transpose(self, state: Any, options: dict[str, Any]) -> Any:
        return self.solver.transpose(state, options)

    def conj(self, state: Any, options: dict[str, Any]) -> Any:
        return self.solver.conj(state, options)

    def assume_full_rank(self) -> bool:
        return self.solver.assume_full_rank()


def _check_stateless(modulator: AbstractGradMod, start: Array) -> None:
    memory = jax.eval_shape(jax.vmap(modulator.init), start)
    if jax.tree.leaves(memory):
        raise ValueError(
            f"Expected a modulator without a state, got {type(modulator).__name__}: a "
            "rule that changes from step to step has no fixed point. Use "
            "GradientDescent or MLPGradMod(normalise=False), or solve_4dvarnet_1d (or "
            "_2d) with RecursiveCheckpointAdjoint() or KStepAdjoint(k)."
        )


def _check(modulator: Any, rtol: Any, atol: Any, max_steps: Any, throw: Any) -> None:
    check_modulator(modulator)
    check_count("max_steps", max_steps)
    check_flag("throw", throw)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(
                f"Expected `{name}` to be a number between 0 and 1, got {value!r}. Pass "
                "for example 1e-5 in single precision, 1e-10 in double."
            )
