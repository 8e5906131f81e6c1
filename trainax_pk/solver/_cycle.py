"""Cycled assimilation: forecast, analysis, forecast, …, in one scan."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trainax_pk._tree import check_count, check_flag
from trainax_pk.solver._windows import check_stepper


class Cycle(eqx.Module):
    """What `cycle` returns.

    Attributes:
        analysis: `(num_cycles, *state)`, or `(num_cycles, num_times, *state)`.
        forecast: What each analysis started from, of the same shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import cycle
        >>> trust = lambda forecast, obs, *, obs_op, obs_err_cov: obs
        >>> run = cycle(trust, lambda u: 2 * u, jnp.ones(1), jnp.array([[5.0], [7.0]]),
        ...             obs_op=None, obs_err_cov=None, windowed=False)
        >>> run.analysis[:, 0].tolist(), run.forecast[:, 0].tolist()
        ([5.0, 7.0], [2.0, 10.0])
    """

    analysis: Array
    forecast: Array


def cycle(
    analysis_step: Callable[..., Array],
    forward_model: Any,
    initial: Float[Array, "*state"],
    obs: Array,
    *,
    obs_op: Callable[[Array], Array],
    obs_err_cov: Any,
    windowed: bool = True,
    num_steps: int = 1,
) -> Cycle:
    """Cycled assimilation over many windows.

    Each cycle forecasts from the last state of the previous analysis, and hands forecast
    and observations to the analysis step:

        x_f = (f(u), f²(u), …, f^T(u)), x_a = analysis_step(x_f, y, …), u ← (x_a)_T.

    Not windowed, x_f is the one state `num_steps` steps ahead: a filter.

    Args:
        analysis_step: `(forecast, obs, *, obs_op, obs_err_cov) -> analysis`, such as
            `as_analysis_step` makes.
        forward_model: `u -> u_next`, or an object with `step(state, dt)` and `dt`.
        initial: State that the first forecast starts from.
        obs: Observations, `(num_cycles, num_times, *obs)`, or `(num_cycles, *obs)` if
            not windowed. NaN where nothing was observed.
        obs_op: Observation operator of one state.
        obs_err_cov: Error covariance of the observations of one time.
        windowed: Whether an analysis corrects a window, or a single state.
        num_steps: Model steps from one state to the next.

    Returns:
        Analyses and the forecasts that they corrected. One scan: the program does not
        grow with the number of cycles.

    Raises:
        ValueError: A model that changes a state's shape, a count below 1, observations
            without the axes of cycles and times; what the analysis step raises.

    Example:
        >>> import jax.numpy as jnp, lineax as lx
        >>> from trainax_pk.solver import as_analysis_step, cycle
        >>> step = as_analysis_step(lx.QR(), background_cov=1.0, windowed=False)
        >>> run = cycle(step, lambda u: 2 * u, jnp.ones(1), jnp.full((3, 1), 4.0),
        ...             obs_op=lambda u: u, obs_err_cov=1.0, windowed=False)
        >>> [round(float(u), 3) for u in run.analysis[:, 0]]
        [3.0, 5.0, 7.0]
    """
    check_flag("windowed", windowed)
    check_count("num_steps", num_steps)
    initial, obs = jnp.asarray(initial), jnp.asarray(obs)
    stepper = _stepper(forward_model)
    check_stepper(stepper, initial)
    if obs.ndim < 1 + windowed:
        axes = "(num_cycles, num_times, *obs)" if windowed else "(num_cycles, *obs)"
        raise ValueError(
            f"Expected observations {axes}, got the shape {obs.shape}. Add the axis, or "
            "change `windowed`."
        )

    def forecast(u: Array) -> Array:
        def advance(u: Array, _: None) -> tuple[Array, Array]:
            u = jax.lax.fori_loop(0, num_steps, lambda _, u: stepper(u), u)
            return u, u

        states = jax.lax.scan(advance, u, length=obs.shape[1] if windowed else 1)[1]
        return states if windowed else states[0]

    def one(u: Array, y: Array) -> tuple[Array, Cycle]:
        ahead = forecast(u)
        found = analysis_step(ahead, y, obs_op=obs_op, obs_err_cov=obs_err_cov)
        return found[-1] if windowed else found, Cycle(found, ahead)

    return jax.lax.scan(one, initial, obs)[1]


def _stepper(forward_model: Any) -> Callable[[Array], Array]:
    if hasattr(forward_model, "step"):
        return lambda u: forward_model.step(u, forward_model.dt)
    return forward_model
