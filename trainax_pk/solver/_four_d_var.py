"""4D-Var: windows that fit observations and a model, by nonlinear least squares."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float

from trainax_pk._tree import check_count
from trainax_pk.solver._block_tridiagonal import BlockTridiagonal
from trainax_pk.solver._windows import (
    Analysis,
    check_operator,
    check_solver,
    check_stepper,
    check_window,
    default_solver,
    half_squares,
    masked_whitener,
    whitener,
)

Solver = optx.AbstractLeastSquaresSolver | optx.AbstractMinimiser


def strong_4dvar(
    stepper: Callable[[Array], Array],
    observed: Float[Array, "num_times *obs"],
    mask: Bool[Array, "num_times *obs"],
    *,
    initial: Float[Array, "*state"],
    obs_err_cov: Any,
    background: Float[Array, "*state"] | None = None,
    background_cov: Any = None,
    obs_op: Callable[[Array], Array] | None = None,
    solver: Solver | None = None,
    max_steps: int = 64,
) -> Analysis:
    """Strong-constraint 4D-Var: the model is exact, the first state is unknown.

    Minimises over u_0, with u_{t+1} = f(u_t),

        J(u_0) = ½ Σ_t ‖y_t − H(u_t)‖²_{R⁻¹} + ½ ‖u_0 − u_b‖²_{B⁻¹}.

    On windows longer than the model's memory of its initial state J has many minima, and
    what is found depends on `initial` (Pires et al. 1996,
    doi:10.1034/j.1600-0870.1996.00006.x): run it first on the front of the window, then
    on more of it.

    Args:
        stepper: f, `u -> u_next` on one state.
        observed: y, observations of one window; time 0 is that of u_0.
        mask: Where the window was observed.
        initial: First guess of u_0.
        obs_err_cov: R of one time: a variance, variances `(*obs)`, or a covariance
            `(n, n)`; of a full one the gaps are marginalised.
        background: u_b, or None for no background term.
        background_cov: B, with `background`: a variance, variances or a covariance.
        obs_op: H, a function of one state; None observes the state itself.
        solver: Least-squares solver or minimiser of optimistix; by default
            Levenberg-Marquardt to the square root of the precision.
        max_steps: The most steps of the solver.

    Returns:
        The trajectory from the minimiser, and whether it converged. Cost of a step: one
        Jacobian (the model, linearised, for each entry of u_0) and its QR.

    Raises:
        ValueError: Shapes that do not fit, NaN where the mask is True, covariances that
            are not positive, a background without its covariance.

    Source: Le Dimet and Talagrand 1986, doi:10.3402/tellusa.v38i2.11706.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import strong_4dvar
        >>> observed = jnp.array([[0.0], [4.0], [0.0], [1.0]])
        >>> found = strong_4dvar(lambda u: u / 2, observed, observed > 0,
        ...                      initial=jnp.ones(1), obs_err_cov=1.0)
        >>> [round(float(u), 3) for u in found.state[:, 0]], bool(found.converged)
        ([8.0, 4.0, 2.0, 1.0], True)
    """
    observed, mask = check_window(observed, mask)
    initial = jnp.asarray(initial, observed.dtype)
    check_stepper(stepper, initial)
    obs_op = check_operator(obs_op, initial, observed.shape[1:])
    whiten = masked_whitener(obs_err_cov, mask, observed.dtype)
    prior = _background(background, background_cov, initial)

    def trajectory(u: Array) -> Array:
        # The last state is not stepped: it may be where a window of a batch blows up.
        _, later = jax.lax.scan(_recorded(stepper), u, length=observed.shape[0] - 1)
        return jnp.concatenate([u[None], later])

    def residuals(u: Array, _: None) -> tuple[Array, Array]:
        predicted = jax.vmap(obs_op)(trajectory(u))
        return whiten(jnp.where(mask, predicted - observed, 0.0)), prior(u)

    solution = _solve(residuals, initial, solver, max_steps, None)
    return _analysis(solution, trajectory(solution.value), residuals)


def weak_4dvar(
    stepper: Callable[[Array], Array],
    observed: Float[Array, "num_times *obs"],
    mask: Bool[Array, "num_times *obs"],
    *,
    initial: Float[Array, "num_times *state"],
    obs_err_cov: Any,
    model_err_cov: Any,
    background: Float[Array, "*state"] | None = None,
    background_cov: Any = None,
    obs_op: Callable[[Array], Array] | None = None,
    solver: Solver | None = None,
    max_steps: int = 64,
) -> Analysis:
    """Weak-constraint 4D-Var: all states are unknown, the model errs.

    Minimises over u_0 … u_{T−1}

        J(u) = ½ Σ_t ‖y_t − H(u_t)‖²_{R⁻¹} + ½ Σ_t ‖u_{t+1} − f(u_t)‖²_{Q⁻¹}
             + ½ ‖u_0 − u_b‖²_{B⁻¹}.

    Without chains of model steps, J is far smoother than that of the strong constraint;
    a small Q approaches it. For a linear model with a background the minimiser is the
    mean of the Rauch-Tung-Striebel smoother.

    Args:
        stepper: f, `u -> u_next` on one state.
        observed: y, observations of one window.
        mask: Where the window was observed.
        initial: First guess of all states, such as `linear_interpolation` gives.
        obs_err_cov: R of one time: a variance, variances `(*obs)`, or a covariance
            `(n, n)`; of a full one the gaps are marginalised.
        model_err_cov: Q of one step: a variance, variances or a covariance.
        background: u_b, or None for no background term.
        background_cov: B, with `background`.
        obs_op: H, a function of one state; None observes the state itself.
        solver: Least-squares solver or minimiser of optimistix; by default
            Levenberg-Marquardt whose linear systems, block tridiagonal in time, are
            solved directly.
        max_steps: The most steps of the solver.

    Returns:
        The states, and whether the solve converged. Cost of a step: prod(state)
        linearised model steps at each time, all times at once, and
        num_times · prod(state)³.

    Raises:
        ValueError: As `strong_4dvar`.

    Source: Trémolet 2006, doi:10.1256/qj.05.224.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import weak_4dvar
        >>> observed = jnp.array([[0.0], [0.0], [3.0]])  # a random walk from 0
        >>> found = weak_4dvar(
        ...     lambda u: u, observed, observed > 0, initial=jnp.zeros((3, 1)),
        ...     obs_err_cov=1.0, model_err_cov=1.0,
        ...     background=jnp.zeros(1), background_cov=1e-6)
        >>> [round(float(u), 3) for u in found.state[:, 0]]
        [0.0, 1.0, 2.0]
    """
    observed, mask = check_window(observed, mask)
    initial = jnp.asarray(initial, observed.dtype)
    if initial.ndim == 0 or initial.shape[0] != observed.shape[0]:
        raise ValueError(
            f"Expected `initial` to hold {observed.shape[0]} states, one for each time, "
            f"got shape {initial.shape}. Pass for example linear_interpolation(...)."
        )
    check_stepper(stepper, initial[0])
    obs_op = check_operator(obs_op, initial[0], observed.shape[1:])
    whiten = masked_whitener(obs_err_cov, mask, observed.dtype)
    shape = initial.shape[1:]
    whiten_model = whitener("model_err_cov", model_err_cov, shape, observed.dtype)
    prior = _background(background, background_cov, initial[0])
    model = eqx.filter_closure_convert(stepper, initial[0])

    def residuals(u: Array, _: None) -> tuple[Array, Array, Array]:
        predicted = jax.vmap(obs_op)(u)
        jumps = u[1:] - _advance(model, u[:-1])
        misfit = whiten(jnp.where(mask, predicted - observed, 0.0))
        return misfit, jax.vmap(whiten_model)(jumps), prior(u[0])

    solution = _solve(
        residuals, initial, solver, max_steps, lx.Normal(BlockTridiagonal())
    )
    return _analysis(solution, solution.value, residuals)


@eqx.filter_custom_jvp
def _advance(stepper: Callable, states: Float[Array, "num_times *state"]) -> Array:
    """All states one step on; its derivative is a matrix for each time.

    The normal equations are read off with many directions at one point. The matrices do
    not depend on the direction, so that the model is linearised once for all of them.
    """
    return jax.vmap(stepper)(states)


@_advance.def_jvp
def _advance_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    stepper, states = primals
    weights, directions = tangents
    after = _advance(stepper, states)
    change = jnp.zeros_like(after)
    if directions is not None:
        matrices = jax.vmap(jax.jacfwd(stepper))(states)
        rank = states.ndim - 1
        change = jax.vmap(lambda a, d: jnp.tensordot(a, d, rank))(matrices, directions)
    if jax.tree.leaves(weights):
        shift = lambda f: jax.vmap(f)(states)  # noqa: E731
        change = change + eqx.filter_jvp(shift, (stepper,), (weights,))[1]
    return after, change


def _recorded(stepper: Callable) -> Callable:
    def step(u: Array, _: None) -> tuple[Array, Array]:
        u = stepper(u)
        return u, u

    return step


def _background(
    background: Any, background_cov: Any, state: Array
) -> Callable[[Array], Array]:
    if (background is None) != (background_cov is None):
        raise ValueError(
            "Expected `background` and `background_cov` together, got one of them. "
            "Leave both out for no background term."
        )
    if background is None:
        return lambda u: jnp.zeros(0, u.dtype)
    mean = jnp.asarray(background, state.dtype)
    if mean.shape != state.shape:
        raise ValueError(
            f"Expected `background` of shape {state.shape}, that of a state, got "
            f"{mean.shape}."
        )
    whiten = whitener("background_cov", background_cov, state.shape, state.dtype)
    return lambda u: whiten(u - mean)


def _solve(
    residuals: Callable, initial: Array, solver: Any, max_steps: int, linear_solver: Any
) -> optx.Solution:
    check_count("max_steps", max_steps)
    if solver is None:
        solver = default_solver(initial.dtype, linear_solver)
    check_solver(solver)
    return optx.least_squares(
        residuals, solver, initial, max_steps=max_steps, throw=False
    )


def _analysis(solution: optx.Solution, state: Array, residuals: Callable) -> Analysis:
    return Analysis(
        state=state,
        converged=(solution.result == optx.RESULTS.successful)
        & jnp.isfinite(state).all(),
        num_steps=solution.stats["num_steps"],
        cost=half_squares(*residuals(solution.value, None)),
    )
