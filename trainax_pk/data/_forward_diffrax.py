"""Differential equations solved by diffrax, as forward models."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk._extras import load
from trainax_pk._tree import check_count
from trainax_pk.adjoint import solve_ode, to_diffrax_adjoint
from trainax_pk.data._forward import Observed, check_time


class DiffraxModel(eqx.Module):
    """ẏ = f(t, y, args) from t = 0, solved by diffrax.

    With `dt`, a forward model: `step(state, dt)` integrates over `dt` with as many
    inner steps as the controller takes. Every step starts at t = 0 again, so what is
    stepped must be autonomous: a vector field that reads t sees [0, dt] in each step;
    carry the time in the state, or use `save_times`. With `save_times`, a plain callable
    `y0 -> ys` with leaves `(num_save_times, ...)`. A solve that fails (too many steps,
    a step size below the smallest) gives NaN, which a `SimulationDataset` treats by its
    `on_failure`.

    Attributes:
        vector_field: `(t, y, args) -> ẏ`, or a diffrax term.
        solver: A diffrax solver.
        dt: Time of one step, or None.
        save_times: Increasing times > 0 (or from 0 on) at which y is kept, or None.
        args: PyTree handed to the vector field.
        dt0: First inner step; None lets an adaptive controller choose.
        stepsize_controller: A diffrax controller, None for constant steps.
        adjoint: Adjoint of the ODE layer, as for `tx.adjoint.solve_ode`, for who
            differentiates through the model; None for diffrax's default.
        max_steps: Most inner steps of one solve.
        state_signature: As in `ForwardModel`.

    Raises:
        ValueError: Not exactly one of `dt` and `save_times`, times that do not
            increase, no `dt0` for constant steps, an adjoint of another layer.

    Source: Kidger 2021, arXiv:2202.02435.

    Example:
        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import DiffraxModel
        >>> decay = DiffraxModel(
        ...     lambda t, y, rate: -rate * y, diffrax.Tsit5(), args=2.0,
        ...     save_times=(0.5, 1.0), dt0=0.01,
        ... )
        >>> [round(float(y), 3) for y in decay(jnp.array(1.0))]
        [0.368, 0.135]
    """

    vector_field: Any
    solver: Any
    dt: float | None = eqx.field(default=None, static=True, kw_only=True)
    save_times: tuple[float, ...] | None = eqx.field(
        default=None, static=True, kw_only=True, converter=lambda x: _as_times(x)
    )
    args: PyTree[Any] = eqx.field(default=None, kw_only=True)
    dt0: float | None = eqx.field(default=None, static=True, kw_only=True)
    stepsize_controller: Any = eqx.field(default=None, kw_only=True)
    adjoint: Any = eqx.field(default=None, kw_only=True)
    max_steps: int = eqx.field(default=4096, static=True, kw_only=True)
    state_signature: Any = eqx.field(default=None, static=True, kw_only=True)

    def __check_init__(self) -> None:
        if self.adjoint is not None:
            to_diffrax_adjoint(self.adjoint)
        if (self.dt is None) == (self.save_times is None):
            raise ValueError(
                f"Expected exactly one of `dt` and `save_times`, got dt={self.dt} and "
                f"save_times={self.save_times}. Pass dt for a model that is stepped, "
                "save_times for whole solutions."
            )
        if self.dt is not None:
            check_time("dt", self.dt)
        if self.dt0 is None and self.stepsize_controller is None:
            raise ValueError(
                "Expected `dt0` for constant steps, got None. Pass dt0, or an adaptive "
                "stepsize_controller such as diffrax.PIDController(rtol, atol)."
            )
        check_count("max_steps", self.max_steps)

    def __call__(self, y0: PyTree[Array]) -> PyTree[Array]:
        """The solution at the save times, leaves `(num_save_times, ...)`."""
        if self.save_times is None:
            return self.step(y0, self.dt)
        diffrax = load("diffrax")
        times = jnp.asarray(self.save_times)
        return self._solve(y0, self.save_times[-1], diffrax.SaveAt(ts=times))

    def step(self, state: PyTree[Array], dt: Any) -> PyTree[Array]:
        """The state after the time `dt`, from t = 0: for autonomous vector fields."""
        diffrax = load("diffrax")
        ys = self._solve(state, dt, diffrax.SaveAt(t1=True))
        return jax.tree.map(lambda y: y[0], ys)

    def __or__(self, observe: Callable[[PyTree], PyTree]) -> Observed:
        """`model | observe`."""
        return Observed(self, observe)

    def _solve(self, y0: PyTree[Array], t1: Any, saveat: Any) -> PyTree[Array]:
        diffrax = load("diffrax")
        field = self.vector_field
        term = (
            field if isinstance(field, diffrax.AbstractTerm) else diffrax.ODETerm(field)
        )
        # Values are diffrax's in either case; what simulates only need not know how
        # the gradients would be made.
        plain = self.adjoint is None
        solve = diffrax.diffeqsolve if plain else solve_ode
        options = {} if plain else {"adjoint": self.adjoint}
        solution = solve(
            term,
            self.solver,
            0.0,
            t1,
            self.dt0,
            y0,
            self.args,
            saveat=saveat,
            stepsize_controller=self.stepsize_controller or diffrax.ConstantStepSize(),
            max_steps=self.max_steps,
            # One failed sample must not end the simulation of all the others.
            throw=False,
            **options,
        )
        good = solution.result == diffrax.RESULTS.successful
        return jax.tree.map(lambda y: jnp.where(good, y, jnp.nan), solution.ys)


def _as_times(times: Sequence[float] | None) -> tuple[float, ...] | None:
    if times is None:
        return None
    array = np.asarray(times, dtype=float)
    bad_shape = array.ndim != 1 or array.size == 0
    if bad_shape or array[0] < 0 or array[-1] <= 0 or (np.diff(array) <= 0).any():
        raise ValueError(
            f"Expected `save_times` to be increasing times >= 0, got {times!r}. The "
            "solution starts at t = 0."
        )
    return tuple(float(t) for t in array)
