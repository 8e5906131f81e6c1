"""The one loop of all generators: samples vmapped, time scanned, compiled once."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check


def simulate(
    stepper: Callable[[Array], Array],
    initial: Callable[[PRNGKeyArray, int], Array],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    temporal_horizon: int,
    num_warmup_steps: int = 0,
) -> Float[Array, "num_samples temporal_horizon *state"]:
    """Trajectories from random initial conditions.

    Args:
        stepper: `u -> u_next` without batch axis; a module, so that an equal stepper
            finds the compiled program.
        initial: `(key, num_samples) -> (num_samples, ...)`; a module, likewise.
        key: Random key.
        num_samples: Number of trajectories.
        temporal_horizon: Number of times, the initial condition included.
        num_warmup_steps: Steps before the first time that is returned.

    Returns:
        `(num_samples, temporal_horizon, ...)`.

    Raises:
        ValueError: If a count is too small.
        TypeError: If a count is not an integer or `key` is not a key.
    """
    return _simulate(
        stepper,
        initial,
        _check.random_key(key),
        _check.count("num_samples", num_samples),
        _check.count("temporal_horizon", temporal_horizon),
        _check.count("num_warmup_steps", num_warmup_steps, minimum=0),
    )


@eqx.filter_jit
def _simulate(
    stepper: Callable[[Array], Array],
    initial: Callable[[PRNGKeyArray, int], Array],
    key: PRNGKeyArray,
    num_samples: int,
    num_times: int,
    num_warmup_steps: int,
) -> Array:
    def warm_up(state: Array, _: None) -> tuple[Array, None]:
        return stepper(state), None

    def advance(state: Array, _: None) -> tuple[Array, Array]:
        return stepper(state), state

    def trajectory(state: Array) -> Array:
        state, _ = jax.lax.scan(warm_up, state, None, length=num_warmup_steps)
        # Emits the state before each step: the last step is computed in vain, which
        # is cheaper than to prepend the initial condition in a copy of everything.
        _, states = jax.lax.scan(advance, state, None, length=num_times)
        return states

    return jax.vmap(trajectory)(initial(key, num_samples))
