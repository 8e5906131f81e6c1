"""Whether checkpointed gradients of an ODE are right on this machine."""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from trainax_pk.adjoint._ode import solve_ode

_STEP = 0.1


def probe_checkpointed_gradients(
    solve_fn: Callable[..., diffrax.Solution] = solve_ode,
    checkpoints: Sequence[int | None] = (None, 13, 16, 25),
    *,
    num_steps: int = 100,
    saves: Sequence[str] = ("last", "step ends", "between", "steps"),
) -> dict[tuple[str, int | None], float]:
    """Errors of checkpointed against direct gradients of a small neural ODE.

    Forward values do not show that a checkpointed loop recomputes something else than
    what it computed. `diffrax.diffeqsolve` and its default adjoint give gradients that
    are off by 9 to 34 % for some `checkpoints` (13 of 100 fixed steps among them) in
    single precision if save times are step ends. Run this on the versions and the
    backend that you train on.

    Args:
        solve_fn: `diffrax.diffeqsolve`, or anything called like it.
        checkpoints: Numbers of checkpoints to try.
        num_steps: Number of steps of the solve.
        saves: Patterns of save times: `"last"`, every tenth of the `"step ends"`, as
            many times `"between"` steps, or all `"steps"`.

    Returns:
        For each pattern and number of checkpoints, the norm of the gradients'
        difference relative to that of the direct gradient. Rounding is 1e-6 in single
        precision.

    Raises:
        ValueError: An unknown pattern.

    Example:
        >>> from trainax_pk.adjoint import probe_checkpointed_gradients
        >>> errors = probe_checkpointed_gradients(
        ...     checkpoints=[9], num_steps=20, saves=["step ends"]
        ... )
        >>> max(errors.values()) < 1e-5
        True
    """
    known = {name: _save_at(name, num_steps) for name in _PATTERNS}
    for name in saves:
        if name not in known:
            raise ValueError(
                f"Expected patterns out of {list(known)}, got {name!r}. Pass some of "
                "them as `saves`."
            )
    errors = {}
    for name in saves:
        gradient = _gradient(solve_fn, known[name], num_steps)
        exact = gradient(diffrax.DirectAdjoint())
        for count in checkpoints:
            found = gradient(diffrax.RecursiveCheckpointAdjoint(count))
            off = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            errors[name, count] = float(off)
    return errors


_PATTERNS = ("last", "step ends", "between", "steps")


def _save_at(pattern: str, num_steps: int) -> diffrax.SaveAt:
    end = _STEP * num_steps
    every_tenth = np.linspace(0, end, num_steps // 10 + 1)
    if pattern == "last":
        return diffrax.SaveAt(t1=True)
    if pattern == "steps":
        return diffrax.SaveAt(steps=True)
    if pattern == "step ends":
        return diffrax.SaveAt(ts=every_tenth)
    return diffrax.SaveAt(ts=every_tenth[:-1] + 0.3 * _STEP)


def _gradient(
    solve_fn: Callable[..., diffrax.Solution], saveat: diffrax.SaveAt, num_steps: int
) -> Callable[[Any], np.ndarray]:
    inner, outer, shift = jax.random.split(jax.random.key(0), 3)
    weights = {
        "inner": 0.8 * jax.random.normal(inner, (8, 2)),
        "outer": 0.4 * jax.random.normal(outer, (2, 8)),
        "shift": 0.3 * jax.random.normal(shift, (8,)),
    }

    def field(t: Any, y: Any, w: Any) -> Any:
        del t
        return w["outer"] @ jnp.tanh(w["inner"] @ y + w["shift"])

    def of(adjoint: Any) -> np.ndarray:
        def loss(weights: Any) -> Any:
            solution = solve_fn(
                diffrax.ODETerm(field),
                diffrax.Tsit5(),
                0.0,
                _STEP * num_steps,
                _STEP,
                jnp.array([1.0, 0.5]),
                weights,
                saveat=saveat,
                adjoint=adjoint,
                # diffrax counts one step more where 0.1 is rounded down.
                max_steps=num_steps + 1,
            )
            # Padding of entries that were not reached is infinite.
            ys = jnp.where(jnp.isfinite(solution.ys), solution.ys, 0.0)
            return jnp.sum(ys**2)

        leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(weights))
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])

    return of
