"""Autoregressive application of a stepper."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._stepper import (
    bundle_of,
    check_step,
    state_of,
    step_batch,
)
from trainax_pk._tree import check_count, check_flag
from trainax_pk._types import Window
from trainax_pk.adjoint import AbstractAdjoint, DirectAdjoint, to_rollout_adjoint

_DIRECT = DirectAdjoint()


def rollout(
    stepper: Any,
    u0: PyTree[Array],
    num_steps: int,
    *,
    adjoint: AbstractAdjoint | Any = _DIRECT,
    include_initial: bool = False,
    sample: PyTree[Array] | None = None,
    time: PyTree[Array] | None = None,
    key: PRNGKeyArray | None = None,
) -> PyTree[Array]:
    """Trajectory u₁ … u_T of one sample, u_{t+1} = f(u_t).

    Compute is T calls of the stepper; the program's size does not depend on T. Every
    adjoint gives the same trajectory and only changes its derivative.

    Args:
        stepper: `u -> u_next`, or a `Stepper` that declares what else it takes.
        u0: Initial state, leaves `(channels, *space)`. Use `jax.vmap` for a batch.
        num_steps: Number T of times to produce, a multiple of the stepper's bundle.
        adjoint: How the loop is differentiated.
        include_initial: Whether u₀ stands first.
        sample: Parameters of the trajectory for a conditioned stepper.
        time: Forcing, leaves `(T, ...)`, for a conditioned stepper.
        key: Key for a stochastic stepper.

    Returns:
        States, leaves `(T, ...)`, or `(T + 1, ...)` with the initial one.

    Raises:
        ValueError: A count below 1, no state, too short a forcing, a missing key, a
            stepper that cannot be called or changes shape or dtype, an adjoint of
            another layer.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk import rollout
        >>> rollout(lambda u: u / 2, jnp.array([8.0]), 3)[:, 0]
        Array([4., 2., 1.], dtype=float32)
    """
    check_count("num_steps", num_steps)
    check_flag("include_initial", include_initial)
    adjoint = to_rollout_adjoint(adjoint)
    bundle = bundle_of(stepper)
    if num_steps % bundle:
        raise ValueError(
            f"Expected `num_steps` to be a multiple of the stepper's bundle ({bundle}),"
            f" got {num_steps}. Pass {num_steps + bundle - num_steps % bundle}."
        )
    _check_arguments(u0, time)
    u0 = jax.tree.map(lambda x: jnp.asarray(x)[None], u0)
    batch = Window(
        u0,
        jax.tree.map(lambda x: jnp.asarray(x)[None], sample),
        jax.tree.map(lambda x: jnp.asarray(x)[None], time),
    )
    check_step(stepper, batch, u0, key, "stepper", num_steps=num_steps)

    def body(carry: Any, t: Array) -> tuple[Any, Any]:
        u, nn_state = carry
        out, nn_state = step_batch(stepper, (u,), nn_state, t=t, window=batch, key=key)
        last = jax.tree.map(lambda x: x[:, -1], out) if bundle > 1 else out
        return (last, nn_state), jax.tree.map(lambda x: x[0], out)

    num_calls = num_steps // bundle
    times = jnp.arange(num_calls, dtype=jnp.int32) * bundle
    _, states = adjoint.scan(body, (u0, state_of(stepper)), times, num_calls)
    if bundle > 1:
        states = jax.tree.map(lambda x: x.reshape(num_steps, *x.shape[2:]), states)
    if include_initial:
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), u0, states)
    return states


def _check_arguments(u0: PyTree[Array], time: PyTree[Array]) -> None:
    if not jax.tree.leaves(u0):
        raise ValueError(
            f"Expected a state with at least one array, got {u0!r}. Pass the initial "
            "state as `u0`."
        )
    if any(jnp.ndim(x) == 0 for x in jax.tree.leaves(time)):
        raise ValueError(
            "Expected `time` to have a leading axis of times on every leaf, got a "
            "scalar. What holds for all times goes into `sample`."
        )
