"""Ordinary differential equations whose gradients take this package's adjoints."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from trainax_pk.adjoint._base import AbstractAdjoint
from trainax_pk.adjoint._direct import DirectAdjoint
from trainax_pk.adjoint._ode_grid import Grid, fixed_grid
from trainax_pk.adjoint._ode_save import needs, save
from trainax_pk.adjoint._recursive_checkpoint import RecursiveCheckpointAdjoint
from trainax_pk.adjoint._specs import to_diffrax_adjoint, to_rollout_adjoint

_AT_THE_END = diffrax.SaveAt(t1=True)
_CONSTANT = diffrax.ConstantStepSize()
_CHECKPOINT = RecursiveCheckpointAdjoint()


def solve_ode(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Any,
    t1: Any,
    dt0: Any,
    y0: PyTree[Any],
    args: PyTree[Any] = None,
    *,
    saveat: diffrax.SaveAt = _AT_THE_END,
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: Any = _CHECKPOINT,
    max_steps: int | None = 4096,
    throw: bool = True,
    **options: Any,
) -> diffrax.Solution:
    """Solves dy/dt = f(t, y, args) from t₀ to t₁, differentiated as an adjoint says.

    `diffrax.diffeqsolve` with this package's adjoints; arguments and result are
    diffrax's. Two things differ where the steps are fixed (`ConstantStepSize`, `t0`,
    `t1` and `dt0` known while tracing, explicit solver) and the adjoint is direct or
    checkpointed:

    * The solve is a scan of ⌈(t₁ − t₀)/dt₀⌉ equal steps under that adjoint. Where
      values are saved is decided once, before the loop, and not again when steps are
      recomputed. diffrax's own checkpointed loop can give wrong gradients there
      (`probe_checkpointed_gradients`).
    * `SaveAt(steps=n)` returns as many entries as there are, without padding.

    Everything else goes to diffrax with `to_diffrax_adjoint(adjoint)`.

    Cost: with `RecursiveCheckpointAdjoint()` one state per step and one more forward
    pass. Saved values that are step ends take one state per step until they are
    picked; times between steps, or times that are known only at run time
    (`SaveAt(ts=...)` built inside a jitted function), take a step's interpolation
    coefficients per step. Build `SaveAt` outside.

    Args:
        terms: The vector field, `diffrax.ODETerm(f)`.
        solver: The method of a step.
        t0: First time.
        t1: Last time; before `t0` to integrate backwards.
        dt0: Step size, negative to integrate backwards, or None if the controller
            chooses.
        y0: State at `t0`, a PyTree of arrays.
        args: Passed to the vector field; differentiated like `y0`.
        saveat: Times at which the state is returned.
        stepsize_controller: How steps are chosen.
        adjoint: `DirectAdjoint()`, `RecursiveCheckpointAdjoint(checkpoints)`,
            `BacksolveAdjoint()`, `ImplicitAdjoint()` (steady states), any adjoint of
            diffrax, or a specification of the same name.
        max_steps: The most steps that are taken.
        throw: Whether a failed solve is an error; explicit fixed steps cannot fail.
        **options: As for `diffrax.diffeqsolve` (`event`, `solver_state`, ...); fixed
            steps with one of them are taken by diffrax.

    Returns:
        `diffrax.Solution`.

    Raises:
        ValueError: An adjoint of another layer; more steps than `max_steps`; save times
            that are not sorted or outside of the interval; steps, save times and
            adjoint of which diffrax's gradient is known to be wrong.

    Example:
        >>> import diffrax, jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.adjoint import solve_ode
        >>> def last(rate):
        ...     decay = diffrax.ODETerm(lambda t, y, rate: -rate * y)
        ...     return solve_ode(decay, diffrax.Tsit5(), 0, 1, 0.1, 1.0, rate).ys[-1]
        >>> value, slope = jax.value_and_grad(last)(1.0)  # exp(-1) and -exp(-1)
        >>> print(f"{value:.3f} {slope:.3f}")
        0.368 -0.368
    """
    spec = to_diffrax_adjoint(adjoint)
    ours = _rollout_adjoint(adjoint)
    plain = (
        ours is not None
        and not options
        and type(stepsize_controller) is diffrax.ConstantStepSize
        and not _may_fail(solver)
        and not _reports_more(saveat)
    )
    grid = fixed_grid(t0, t1, dt0, saveat, max_steps) if plain else None
    if grid is not None:
        return _fixed_steps(terms, solver, grid, y0, args, saveat, ours, max_steps)
    return diffrax.diffeqsolve(
        terms,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=stepsize_controller,
        adjoint=spec,
        max_steps=max_steps,
        throw=throw,
        **options,
    )


def _rollout_adjoint(spec: Any) -> AbstractAdjoint | None:
    if type(spec).__name__ in ("DirectAdjoint", "RecursiveCheckpointAdjoint"):
        adjoint = to_rollout_adjoint(spec)
        assert isinstance(adjoint, DirectAdjoint | RecursiveCheckpointAdjoint)
        return adjoint
    return None


def _may_fail(solver: Any) -> bool:
    """Whether a step solves equations, which diffrax then has to watch."""
    inner = getattr(solver, "solver", solver)
    return isinstance(inner, diffrax.AbstractImplicitSolver)


def _reports_more(saveat: diffrax.SaveAt) -> bool:
    """Whether more is asked for than states at times."""
    subs = jax.tree.leaves(saveat.subs, is_leaf=_is_sub)
    return (
        saveat.dense
        or saveat.solver_state
        or saveat.controller_state
        or saveat.made_jump
        or any(sub.ts is not None and sub.steps for sub in subs)
    )


def _is_sub(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def _fixed_steps(
    terms: Any,
    solver: Any,
    grid: Grid,
    y0: Any,
    args: Any,
    saveat: diffrax.SaveAt,
    adjoint: AbstractAdjoint,
    max_steps: int | None,
) -> diffrax.Solution:
    times = jnp.asarray(grid.times)
    y0 = jax.tree.map(
        lambda y: jnp.asarray(y, jnp.result_type(y, grid.times.dtype)), y0
    )
    keep = needs(saveat, grid)
    state = solver.init(terms, times[0], times[1], y0, args) if grid.num_steps else None
    state = jax.tree.map(jnp.asarray, state)

    def step(carry: Any, times: Any) -> Any:
        y, state = carry
        y, _, dense, state, _ = solver.step(
            terms, *times, y, args, state, made_jump=False
        )
        kept = {"states": y, "dense": dense}
        return (y, state), {name: kept[name] for name in keep}

    carry = (y0, state)
    kept: dict[str, Any] = {}
    if grid.num_steps:
        spans = (times[:-1], times[1:])
        carry, kept = adjoint.scan(step, carry, spans, grid.num_steps)
    last, _ = carry
    saved = jax.tree.map(
        lambda sub: save(sub, grid, solver, args, y0, last, kept),
        saveat.subs,
        is_leaf=_is_sub,
    )
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2  # noqa: E731
    count = np.int32(grid.num_steps)
    return diffrax.Solution(
        t0=times[0],
        t1=times[-1],
        ts=jax.tree.map(lambda pair: pair[0], saved, is_leaf=is_pair),
        ys=jax.tree.map(lambda pair: pair[1], saved, is_leaf=is_pair),
        interpolation=None,
        stats={
            "num_steps": count,
            "num_accepted_steps": count,
            "num_rejected_steps": np.int32(0),
            "max_steps": max_steps,
        },
        result=diffrax.RESULTS.successful,
        solver_state=None,
        controller_state=None,
        made_jump=None,
        event_mask=None,
    )
