"""Viscous Burgers equation in one dimension."""

import math
from collections.abc import Callable

import exponax
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._exponax import build
from ._initial import RandomFourier
from ._simulate import simulate


def make_burgers_1d_stepper(
    num_points: int = 128,
    *,
    domain_extent: float = 2 * math.pi,
    dt: float = 0.05,
    diffusivity: float = 0.05,
    num_substeps: int = 1,
) -> Callable[[Float[Array, "1 num_points"]], Float[Array, "1 num_points"]]:
    """Stepper of the viscous Burgers equation on a periodic domain.

    uₜ + ½ (u²)ₓ = ν uₓₓ. Pseudo-spectral with the 2/3 rule, ETDRK4 in time (order 4).
    Shocks have a width of about 4 ν / Δu; if the grid does not resolve it, spurious
    oscillations appear.

    Args:
        num_points: Number N of grid points.
        domain_extent: Length L of the domain.
        dt: Time between two states.
        diffusivity: Diffusivity ν > 0.
        num_substeps: Steps of length dt / num_substeps per call.

    Returns:
        `u -> u_next` on `(1, num_points)`, an exponax stepper.

    Raises:
        ValueError: If an argument is out of range; when called, if the state has
            another shape.
        TypeError: If an argument has the wrong type.

    Reference:
        Kassam and Trefethen 2005, doi:10.1137/S1064827502410633 (ETDRK4).

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import make_burgers_1d_stepper
        >>> make_burgers_1d_stepper(16)(jnp.full((1, 16), 2.0)).round(4).max().item()
        2.0
    """
    num_substeps = _check.count("num_substeps", num_substeps)
    stepper = build(
        exponax.stepper.Burgers,
        1,
        _check.positive("domain_extent", domain_extent),
        _check.count("num_points", num_points, minimum=4),
        _check.positive("dt", dt) / num_substeps,
        diffusivity=_check.positive("diffusivity", diffusivity),
        order=4,
    )
    return exponax.RepeatedStepper(stepper, num_substeps)


def burgers_1d(
    num_points: int = 128,
    num_samples: int = 20,
    *,
    domain_extent: float = 2 * math.pi,
    dt: float = 0.05,
    diffusivity: float = 0.05,
    num_substeps: int = 1,
    highest_init_mode: int = 5,
    init_std: float = 0.5,
    temporal_horizon: int = 100,
    num_warmup_steps: int = 0,
    key: PRNGKeyArray,
) -> Float[Array, "num_samples temporal_horizon 1 num_points"]:
    """Trajectories of the viscous Burgers equation from random Fourier modes.

    uₜ + ½ (u²)ₓ = ν uₓₓ, periodic; see `make_burgers_1d_stepper` for the scheme.

    Args:
        num_points: Number N of grid points.
        num_samples: Number of trajectories.
        domain_extent: Length L of the domain.
        dt: Time between two states.
        diffusivity: Diffusivity ν > 0.
        num_substeps: Steps of length dt / num_substeps between two states.
        highest_init_mode: Highest mode of the initial condition, below N // 2.
        init_std: Standard deviation of the initial condition over space.
        temporal_horizon: Number of times, the initial condition included.
        num_warmup_steps: Steps before the first time that is returned.
        key: Random key.

    Returns:
        `(num_samples, temporal_horizon, 1, num_points)`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax
        >>> from trainax_pk.sample_data import burgers_1d
        >>> burgers_1d(32, 2, temporal_horizon=5, key=jax.random.key(0)).shape
        (2, 5, 1, 32)
    """
    stepper = make_burgers_1d_stepper(
        num_points,
        domain_extent=domain_extent,
        dt=dt,
        diffusivity=diffusivity,
        num_substeps=num_substeps,
    )
    mode = _check.mode("highest_init_mode", highest_init_mode, stepper.num_points)
    init_std = _check.positive("init_std", init_std)
    return simulate(
        stepper,
        RandomFourier(1, stepper.num_points, mode, init_std),
        key,
        num_samples=num_samples,
        temporal_horizon=temporal_horizon,
        num_warmup_steps=num_warmup_steps,
    )
