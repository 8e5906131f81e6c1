"""The three equations of Lorenz (1963)."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._initial import NormalState
from ._runge_kutta import rk4_step
from ._simulate import simulate


class _Lorenz63(eqx.Module):
    dt: float
    sigma: float
    rho: float
    beta: float

    def __call__(self, u: Float[Array, "3"]) -> Float[Array, "3"]:
        if u.shape != (3,):
            raise ValueError(
                f"Expected a state of shape (3,), got {u.shape}. "
                "Use jax.vmap for a batch of states."
            )
        return rk4_step(self._rhs, u, self.dt)

    def _rhs(self, u: Float[Array, "3"]) -> Float[Array, "3"]:
        x, y, z = u
        # `jnp.array` and not `jnp.stack`: on some JAX releases the two round
        # differently in the loop, and trainax's trajectories would not come back.
        return jnp.array(
            [
                self.sigma * (y - x),
                x * (self.rho - z) - y,
                x * y - self.beta * z,
            ]
        )


def make_lorenz_stepper_rk4(
    dt: float = 0.01,
    *,
    sigma: float = 10.0,
    rho: float = 28.0,
    beta: float = 8.0 / 3.0,
) -> Callable[[Float[Array, "3"]], Float[Array, "3"]]:
    """Stepper of the Lorenz system, classical Runge-Kutta of order 4.

    ẋ = σ (y − x), ẏ = x (ρ − z) − y, ż = x y − β z.

    Args:
        dt: Length of a step; 0.01 is Lorenz's own, above 0.1 the scheme breaks down.
        sigma: Prandtl number σ.
        rho: Relative Rayleigh number ρ; chaotic at 28.
        beta: Geometric factor β.

    Returns:
        `u -> u_next` on `(3,)`.

    Raises:
        ValueError: If `dt` is not positive or a number is not finite; when called, if
            the state has another shape.
        TypeError: If an argument is not a number.

    Reference:
        Lorenz 1963, doi:10.1175/1520-0469(1963)020<0130:DNF>2.0.CO;2.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import make_lorenz_stepper_rk4
        >>> u = make_lorenz_stepper_rk4()(jnp.ones(3))
        >>> [round(float(x), 3) for x in u]
        [1.013, 1.26, 0.985]
    """
    return _Lorenz63(
        dt=_check.positive("dt", dt),
        sigma=_check.finite("sigma", sigma),
        rho=_check.finite("rho", rho),
        beta=_check.finite("beta", beta),
    )


def lorenz_rk4(
    num_samples: int = 20,
    *,
    temporal_horizon: int = 1000,
    dt: float = 0.01,
    num_warmup_steps: int = 500,
    sigma: float = 10.0,
    rho: float = 28.0,
    beta: float = 8.0 / 3.0,
    init_std: float = 1.0,
    key: PRNGKeyArray,
) -> Float[Array, "num_samples temporal_horizon 3"]:
    """Trajectories of the Lorenz system on its attractor.

    Starts from normal noise around the origin, steps onto the attractor, and returns
    what follows; see `make_lorenz_stepper_rk4` for the equations. The trajectories are
    those of trainax 0.0.2 for the same key.

    Args:
        num_samples: Number of trajectories.
        temporal_horizon: Number of times, the first one included.
        dt: Length of a step.
        num_warmup_steps: Steps before the first time that is returned.
        sigma: Prandtl number σ.
        rho: Relative Rayleigh number ρ.
        beta: Geometric factor β.
        init_std: Standard deviation of the initial noise.
        key: Random key.

    Returns:
        `(num_samples, temporal_horizon, 3)`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax
        >>> from trainax_pk.sample_data import lorenz_63
        >>> lorenz_63(4, temporal_horizon=10, key=jax.random.key(0)).shape
        (4, 10, 3)
    """
    return simulate(
        make_lorenz_stepper_rk4(dt, sigma=sigma, rho=rho, beta=beta),
        NormalState(3, 0.0, _check.non_negative("init_std", init_std)),
        key,
        num_samples=num_samples,
        temporal_horizon=temporal_horizon,
        num_warmup_steps=num_warmup_steps,
    )


# trainax's names stay beside those that tell the system from Lorenz's of 1996.
lorenz_63 = lorenz_rk4
make_lorenz_63_stepper = make_lorenz_stepper_rk4
