"""States at save times, from what fixed steps left behind."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from trainax_pk._tree import is_concrete
from trainax_pk.adjoint._ode_grid import Grid, on_grid


def needs(saveat: diffrax.SaveAt, grid: Grid) -> set[str]:
    """What every step has to leave behind: its `states`, its `dense` coefficients."""
    found = set()
    for sub in jax.tree.leaves(saveat.subs, is_leaf=_is_sub):
        if sub.ts is not None:
            _check(sub.ts, grid)
            found.add("dense" if on_grid(sub.ts, grid) is None else "states")
        elif sub.steps:
            found.add("states")
    return found


def save(
    sub: diffrax.SubSaveAt,
    grid: Grid,
    solver: Any,
    args: Any,
    first: Any,
    last: Any,
    kept: dict[str, Any],
) -> tuple[jax.Array, Any]:
    """Times and values that a `SubSaveAt` asks for."""
    pieces = []
    one = lambda y: y[None]  # noqa: E731
    if sub.t0:
        pieces.append((grid.times[:1], jax.tree.map(one, first)))
    if sub.ts is not None:
        pieces.append((sub.ts, _at_times(sub.ts, grid, solver, first, kept)))
    elif sub.steps:
        every = slice(sub.steps - 1, None, sub.steps)
        states = jax.tree.map(lambda y: y[every], kept["states"])
        pieces.append((grid.times[1:][every], states))
    if sub.t1 and not (sub.steps and grid.num_steps % sub.steps == 0):
        pieces.append((grid.times[-1:], jax.tree.map(one, last)))
    ts = jnp.concatenate([jnp.asarray(t, grid.times.dtype) for t, _ in pieces])
    ys = jax.tree.map(lambda *y: jnp.concatenate(y), *(y for _, y in pieces))
    return ts, jax.vmap(lambda t, y: sub.fn(t, y, args))(ts, ys)


def _at_times(
    ts: Any, grid: Grid, solver: Any, first: Any, kept: dict[str, Any]
) -> Any:
    if grid.num_steps == 0:
        return jax.tree.map(lambda y: jnp.repeat(y[None], len(ts), axis=0), first)
    index = on_grid(ts, grid)
    if index is not None:
        return jax.tree.map(
            lambda y, ys: jnp.concatenate([y[None], ys])[index], first, kept["states"]
        )
    times, sign = jnp.asarray(grid.times), grid.sign
    ts = jnp.asarray(ts, grid.times.dtype)
    if not is_concrete(ts):
        ts = eqx.error_if(ts, sign * jnp.diff(ts) < 0, _UNSORTED)
        outside = (sign * ts < sign * times[0]) | (sign * ts > sign * times[-1])
        ts = eqx.error_if(ts, outside, _OUTSIDE)
    index = jnp.searchsorted(sign * times, sign * ts) - 1
    index = jnp.clip(index, 0, grid.num_steps - 1)

    def evaluate(t: Any, i: Any) -> Any:
        dense = jax.tree.map(lambda x: x[i], kept["dense"])
        span = {"t0": times[i], "t1": times[i + 1]}
        return solver.interpolation_cls(**span, **dense).evaluate(t)

    return jax.vmap(evaluate)(ts, index)


_UNSORTED = "Expected `ts` of SaveAt to lead from t0 to t1. Sort the save times."
_OUTSIDE = "Expected `ts` of SaveAt between t0 and t1. Leave the others out."


def _check(ts: Any, grid: Grid) -> None:
    if not is_concrete(ts):
        return
    ts = grid.sign * np.asarray(ts, np.float64)
    ends = grid.sign * grid.times[[0, -1]].astype(np.float64)
    if (np.diff(ts) < 0).any():
        raise ValueError(f"{_UNSORTED} Got {grid.sign * ts}.")
    near = 8 * np.finfo(grid.times.dtype).eps * np.abs(ends).max()
    if ts.min() < ends[0] - near or ts.max() > ends[1] + near:
        raise ValueError(f"{_OUTSIDE} Got {grid.sign * ts}.")


def _is_sub(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)
