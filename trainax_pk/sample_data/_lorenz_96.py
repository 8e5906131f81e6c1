"""The ring of Lorenz (1996)."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._initial import NormalState
from ._runge_kutta import rk4_step
from ._simulate import simulate


class _Lorenz96(eqx.Module):
    num_dofs: int
    dt: float
    forcing: float

    def __call__(self, u: Float[Array, "dof"]) -> Float[Array, "dof"]:
        if u.shape != (self.num_dofs,):
            raise ValueError(
                f"Expected a state of shape ({self.num_dofs},), got {u.shape}. "
                "Use jax.vmap for a batch of states."
            )
        return rk4_step(self._rhs, u, self.dt)

    def _rhs(self, u: Float[Array, "dof"]) -> Float[Array, "dof"]:
        ahead, behind, two_behind = jnp.roll(u, -1), jnp.roll(u, 1), jnp.roll(u, 2)
        return (ahead - two_behind) * behind - u + self.forcing


def make_lorenz_96_stepper(
    num_dofs: int = 40, *, dt: float = 0.05, forcing: float = 8.0
) -> Callable[[Float[Array, "num_dofs"]], Float[Array, "num_dofs"]]:
    """Stepper of the Lorenz-96 system, classical Runge-Kutta of order 4.

    u̇ᵢ = (uᵢ₊₁ − uᵢ₋₂) uᵢ₋₁ − uᵢ + F on a ring of D variables.

    Args:
        num_dofs: Number D of variables, at least 4.
        dt: Length of a step; 0.05 stands for 6 hours of weather.
        forcing: Forcing F; chaotic at 8.

    Returns:
        `u -> u_next` on `(num_dofs,)`.

    Raises:
        ValueError: If an argument is out of range; when called, if the state has
            another shape.
        TypeError: If an argument has the wrong type.

    Reference:
        Lorenz 1996, "Predictability: a problem partly solved", ECMWF seminar.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import make_lorenz_96_stepper
        >>> make_lorenz_96_stepper(5)(jnp.full(5, 8.0)).tolist()  # an equilibrium
        [8.0, 8.0, 8.0, 8.0, 8.0]
    """
    return _Lorenz96(
        num_dofs=_check.count("num_dofs", num_dofs, minimum=4),
        dt=_check.positive("dt", dt),
        forcing=_check.finite("forcing", forcing),
    )


def lorenz_96(
    num_samples: int = 20,
    *,
    num_dofs: int = 40,
    temporal_horizon: int = 1000,
    dt: float = 0.05,
    num_warmup_steps: int = 500,
    forcing: float = 8.0,
    init_std: float = 1.0,
    key: PRNGKeyArray,
) -> Float[Array, "num_samples temporal_horizon num_dofs"]:
    """Trajectories of the Lorenz-96 system on its attractor.

    Starts from the equilibrium uᵢ = F plus normal noise, steps onto the attractor, and
    returns what follows; see `make_lorenz_96_stepper` for the equations.

    Args:
        num_samples: Number of trajectories.
        num_dofs: Number D of variables, at least 4.
        temporal_horizon: Number of times, the first one included.
        dt: Length of a step.
        num_warmup_steps: Steps before the first time that is returned.
        forcing: Forcing F.
        init_std: Standard deviation of the initial noise.
        key: Random key.

    Returns:
        `(num_samples, temporal_horizon, num_dofs)`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax
        >>> from trainax_pk.sample_data import lorenz_96
        >>> lorenz_96(4, temporal_horizon=10, key=jax.random.key(0)).shape
        (4, 10, 40)
    """
    stepper = make_lorenz_96_stepper(num_dofs, dt=dt, forcing=forcing)
    init_std = _check.non_negative("init_std", init_std)
    return simulate(
        stepper,
        NormalState(stepper.num_dofs, stepper.forcing, init_std),
        key,
        num_samples=num_samples,
        temporal_horizon=temporal_horizon,
        num_warmup_steps=num_warmup_steps,
    )
