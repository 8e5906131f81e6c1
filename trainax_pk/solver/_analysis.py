"""Analysis steps: a forecast, corrected by observations that it is given."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array

from trainax_pk._batch import Batch1D, Batch2D
from trainax_pk._tree import check_count, check_flag, is_concrete
from trainax_pk.solver._four_d_var_net import (
    FourDVarNet1D,
    FourDVarNet2D,
    solve_4dvarnet_1d,
    solve_4dvarnet_2d,
)
from trainax_pk.solver._windows import (
    Analysis,
    Whitener,
    check_operator,
    half_squares,
    masked_whitener,
    square_root,
    whitener,
)

_LEARNED = FourDVarNet1D | FourDVarNet2D
_ITERATIVE = optx.AbstractLeastSquaresSolver | optx.AbstractMinimiser


class AnalysisStep(eqx.Module):
    """`(forecast, obs, *, obs_op, obs_err_cov) -> analysis`; see `as_analysis_step`.

    Attributes:
        solver: What finds the analysis.
        background_cov: B, the error covariance of a forecast, or None.
        offset: Subtracted from states before a learned solver sees them.
        scale: What they are divided by then.
        unit_variance: Observation error variance at which a learned solver's own
            observation weight holds, in its units.
        windowed: Whether forecasts and observations have a leading time axis.
        max_steps: The most steps of an iterative solver.

    Raises:
        ValueError: As `as_analysis_step`.

    Example:
        >>> import jax.numpy as jnp, lineax as lx
        >>> from trainax_pk.solver import as_analysis_step
        >>> step = as_analysis_step(lx.QR(), background_cov=1.0, windowed=False)
        >>> step(jnp.zeros(1), jnp.array([4.0]), obs_op=lambda u: u, obs_err_cov=3.0)
        Array([1.], dtype=float32)
    """

    solver: Any
    background_cov: Any
    offset: Any
    scale: Any
    unit_variance: float = eqx.field(static=True)
    windowed: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def __call__(
        self,
        forecast: Array,
        obs: Array,
        *,
        obs_op: Callable[[Array], Array],
        obs_err_cov: Any,
    ) -> Array:
        """The analysis, of the shape of the forecast."""
        found = self.analyse(forecast, obs, obs_op=obs_op, obs_err_cov=obs_err_cov)
        return found.state

    def analyse(
        self,
        forecast: Array,
        obs: Array,
        *,
        obs_op: Callable[[Array], Array],
        obs_err_cov: Any,
    ) -> Analysis:
        """The analysis, and whether the solve converged.

        Args:
            forecast: x_f, `(num_times, *state)`, or `(*state)` if not windowed.
            obs: y, `(num_times, *obs)` or `(*obs)`. NaN where nothing was observed.
            obs_op: H, from one state to the observations of one time. If it has
                `linearize(state)`, a linear solver takes the tangent from there: a
                matrix of the flattened entries, or a function.
            obs_err_cov: R of one time: a variance, variances `(*obs)`, or a covariance.

        Returns:
            The analysis. A learned solver takes a given number of steps: `converged`
            says no more than that its result is finite.

        Raises:
            ValueError: Shapes that do not fit, covariances that are not positive.
        """
        forecast, obs = jnp.asarray(forecast), jnp.asarray(obs)
        if not self.windowed:
            forecast, obs = forecast[None], obs[None]
        _check_times(forecast, obs)
        obs_op = check_operator(obs_op, forecast[0], obs.shape[1:])
        mask = ~jnp.isnan(obs)
        obs = jnp.where(mask, obs, 0.0).astype(forecast.dtype)
        whiten = masked_whitener(obs_err_cov, mask, forecast.dtype)
        found = _KINDS[_kind(self.solver)](self, forecast, obs, mask, obs_op, whiten)
        state = found.state if self.windowed else found.state[0]
        return eqx.tree_at(lambda a: a.state, found, state)


def as_analysis_step(
    solver: Any,
    *,
    background_cov: Any = None,
    offset: Any = 0.0,
    scale: Any = 1.0,
    unit_variance: float = 1.0,
    windowed: bool = True,
    max_steps: int = 64,
) -> AnalysisStep:
    """Makes an analysis step of a solver, with everything else given at the call.

    With x_f the forecast, H the observation operator and R its error covariance, all of
    them arguments of the call, the step minimises

        J(x) = ½ ‖y − H(x)‖²_{R⁻¹} + ½ ‖x − x_f‖²_{B⁻¹}

    | solver | analysis |
    | --- | --- |
    | of lineax, such as `lx.QR()` | H linearised at x_f: the (extended) Kalman analysis |
    | of optimistix, such as `optx.LevenbergMarquardt(...)` | the minimiser: 3D-Var |
    | `FourDVarNet1D`, `FourDVarNet2D` | its K steps from x_f on 2 w_o J and its prior |

    A learned solver needs no B: then J has its first term alone. Its own
    `background_weight` w_b, in the units it was trained in, draws the first state to
    that of the forecast instead of B; the two together would count it twice.

    Args:
        solver: One of the above.
        background_cov: B: a variance, variances of the forecast's shape, or a
            covariance of its flattened entries. Needed but for a learned solver.
        offset: A learned solver works on (x − offset) / scale, as it was trained;
            forecasts, observations, H, R and B are in physical units all the same.
        scale: See `offset`.
        unit_variance: R, in physical units, at which a learned solver's own observation
            weight w_o holds: that of its training data if misfits were standardised by
            nothing else. A larger R weakens the observations from there.
        windowed: Whether forecast and observations have a leading time axis. A learned
            solver needs it.
        max_steps: The most steps of an optimistix solver.

    Returns:
        `step(forecast, obs, *, obs_op, obs_err_cov)`; `step.analyse` takes the same and
        reports convergence beside the state.

    Raises:
        ValueError: A solver of another kind, a missing `background_cov`, a learned
            solver without windows, a `unit_variance` that is not positive.

    Example:
        >>> import jax.numpy as jnp, optimistix as optx
        >>> from trainax_pk.solver import as_analysis_step
        >>> solver = optx.LevenbergMarquardt(rtol=1e-5, atol=1e-5)
        >>> step = as_analysis_step(solver, background_cov=2.0, windowed=False)
        >>> first = lambda u: u[:1]
        >>> x = step(jnp.zeros(2), jnp.array([3.0]), obs_op=first, obs_err_cov=1.0)
        >>> [round(float(v), 3) for v in x]
        [2.0, 0.0]
    """
    kind = _kind(solver)
    check_flag("windowed", windowed)
    check_count("max_steps", max_steps)
    if kind == "learned" and not windowed:
        raise ValueError(
            "Expected `windowed=True` with a learned solver, which reconstructs windows "
            "(num_times, *state), got False."
        )
    if kind == "learned" and background_cov is not None and solver.cost.has_background:
        raise ValueError(
            "Expected `background_cov` or a learned solver with `background_weight`, got "
            "both, which would count the forecast twice. Leave `background_cov` out."
        )
    if kind != "learned" and background_cov is None:
        raise ValueError(
            "Expected `background_cov`, got None. Without the error covariance of the "
            "forecast nothing says how far to trust it; only a learned solver has a "
            "prior of its own."
        )
    if not (isinstance(unit_variance, int | float) and unit_variance > 0):
        raise ValueError(
            f"Expected `unit_variance` > 0, got {unit_variance!r}. Pass the variance of "
            "the observation errors in training."
        )
    return AnalysisStep(
        solver=solver,
        background_cov=background_cov,
        offset=offset,
        scale=scale,
        unit_variance=float(unit_variance),
        windowed=windowed,
        max_steps=max_steps,
    )


def _kind(solver: Any) -> str:
    if isinstance(solver, lx.AbstractLinearSolver):
        return "linear"
    if isinstance(solver, _ITERATIVE):
        return "iterative"
    if isinstance(solver, _LEARNED):
        return "learned"
    raise ValueError(
        f"Expected `solver` to be a FourDVarNet1D or 2D, a solver of optimistix, or a "
        f"linear solver of lineax, got {solver!r}."
    )


def _check_times(forecast: Array, obs: Array) -> None:
    if forecast.ndim == 0 or obs.ndim == 0 or forecast.shape[0] != obs.shape[0]:
        raise ValueError(
            f"Expected forecast and observations of as many times, got the shapes "
            f"{forecast.shape} and {obs.shape}. Mark times without observations by NaN; "
            "for single states build the step with windowed=False."
        )
    if is_concrete(obs) and bool(jnp.isinf(obs).any()):
        raise ValueError(
            "Expected finite observations or NaN, got infinity. Use NaN for what was "
            "not observed."
        )


def _control(step: AnalysisStep, forecast: Array) -> Callable[[Array], Array]:
    # x = x_f + C v with C Cᵀ = B: the background term is ½ ‖v‖², well conditioned.
    covariance, shape = step.background_cov, forecast.shape
    if not step.windowed:
        # Variances of one state, for a window of one time.
        array = jnp.asarray(covariance)
        covariance = array[None] if array.shape == shape[1:] != () else array
    return square_root("background_cov", covariance, shape, forecast.dtype)


def _linear(
    step: AnalysisStep,
    forecast: Array,
    obs: Array,
    mask: Array,
    obs_op: Callable,
    whiten: Whitener,
) -> Analysis:
    colour = _control(step, forecast)
    tangent = jax.vmap(_tangent(obs_op))
    misfit = whiten(jnp.where(mask, obs - jax.vmap(obs_op)(forecast), 0.0))

    def rows(v: Array) -> tuple[Array, Array]:
        change = tangent(forecast, colour(v))
        return whiten(jnp.where(mask, change, 0.0)), v

    zero = jnp.zeros_like(forecast)
    operator = lx.FunctionLinearOperator(rows, jax.eval_shape(lambda: zero))
    solution = lx.linear_solve(operator, (misfit, zero), step.solver, throw=False)
    fitted, v = rows(solution.value)
    state = forecast + colour(v)
    return Analysis(
        state=state,
        converged=(solution.result == lx.RESULTS.successful)
        & jnp.isfinite(state).all(),
        num_steps=jnp.asarray(solution.stats.get("num_steps", 0)),
        cost=half_squares(misfit - fitted, v),
    )


def _tangent(obs_op: Any) -> Callable[[Array, Array], Array]:
    if not hasattr(obs_op, "linearize"):
        return lambda u, du: jax.jvp(obs_op, (u,), (du,))[1]

    def apply(u: Array, du: Array) -> Array:
        linear = obs_op.linearize(u)
        if callable(linear):
            return linear(du)
        shape = eqx.filter_eval_shape(obs_op, u).shape
        return (jnp.asarray(linear, du.dtype) @ du.reshape(-1)).reshape(shape)

    return apply


def _iterative(
    step: AnalysisStep,
    forecast: Array,
    obs: Array,
    mask: Array,
    obs_op: Callable,
    whiten: Whitener,
) -> Analysis:
    colour = _control(step, forecast)

    def residuals(v: Array, _: None) -> tuple[Array, Array]:
        predicted = jax.vmap(obs_op)(forecast + colour(v))
        return whiten(jnp.where(mask, predicted - obs, 0.0)), v

    solution = optx.least_squares(
        residuals, step.solver, jnp.zeros_like(forecast), max_steps=step.max_steps,
        throw=False,
    )  # fmt: skip
    state = forecast + colour(solution.value)
    return Analysis(
        state=state,
        converged=(solution.result == optx.RESULTS.successful)
        & jnp.isfinite(state).all(),
        num_steps=solution.stats["num_steps"],
        cost=half_squares(*residuals(solution.value, None)),
    )


def _learned(
    step: AnalysisStep,
    forecast: Array,
    obs: Array,
    mask: Array,
    obs_op: Callable,
    whiten: Whitener,
) -> Analysis:
    solver, dtype, unit = step.solver, forecast.dtype, math.sqrt(step.unit_variance)
    offset, scale = (jnp.asarray(c, dtype) for c in (step.offset, step.scale))
    physical = lambda z: jnp.broadcast_to(offset, z.shape) + scale * z  # noqa: E731
    background = lambda u: jnp.zeros((u.shape[0], 0), dtype)  # noqa: E731
    if step.background_cov is not None:
        back = whitener("background_cov", step.background_cov, forecast.shape, dtype)
        background = back

    def stacked(predicted: Array, u: Array) -> Array:
        parts = whiten(jnp.where(mask, predicted, 0.0)), background(u)
        # Time by time, which some preconditioners need.
        rows = [part.reshape(u.shape[0], -1) for part in parts]
        # The solver's batches have as many axes as its states.
        axes = [1] * (forecast.ndim - 2)
        return unit * jnp.concatenate(rows, axis=1).reshape(u.shape[0], -1, *axes)

    def observation(z: Array) -> Array:
        u = physical(z)
        return stacked(jax.vmap(obs_op)(u), u)

    cost = eqx.tree_at(
        lambda c: c.observation, solver.cost, observation, is_leaf=lambda x: x is None
    )
    y = stacked(obs, forecast)[None]
    start = ((forecast - jnp.broadcast_to(offset, forecast.shape)) / scale)[None]
    batch, solve = (Batch1D, solve_4dvarnet_1d)
    if isinstance(solver, FourDVarNet2D):
        batch, solve = (Batch2D, solve_4dvarnet_2d)
    seen = jnp.ones(y.shape, bool)
    z = solve(
        batch(y, seen, initial=start), cost, solver.modulator, solver.num_steps,
        solver_adjoint=solver.solver_adjoint, preconditioner=solver.preconditioner,
    )[0]  # fmt: skip
    state = physical(z)
    if cost.has_background and cost.background is None:
        cost = cost.about(start[0, 0])
    return Analysis(
        state=state,
        converged=jnp.isfinite(state).all(),
        num_steps=jnp.asarray(solver.num_steps),
        cost=0.5 * cost(z, y[0], seen[0]),
    )


_KINDS = {"linear": _linear, "iterative": _iterative, "learned": _learned}
