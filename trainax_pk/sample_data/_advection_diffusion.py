"""Advection and diffusion in two dimensions, exact in time."""

import math
from collections.abc import Callable, Sequence

import exponax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._exponax import build
from ._initial import RandomFourier
from ._simulate import simulate


def make_advection_diffusion_2d_stepper(
    num_points: int = 48,
    *,
    domain_extent: float = 2 * math.pi,
    dt: float = 0.05,
    velocity: Sequence[float] = (1.0, 0.5),
    diffusivity: float = 0.01,
) -> Callable[
    [Float[Array, "1 num_points num_points"]], Float[Array, "1 num_points num_points"]
]:
    """Stepper of advection-diffusion on a periodic square.

    uₜ + c · ∇u = ν Δu. Every Fourier mode is multiplied by
    exp((−i k·c − ν |k|²) Δt): exact for fields below the Nyquist mode, stable for any
    step.

    Args:
        num_points: Number N of grid points per axis.
        domain_extent: Length L of the square's side.
        dt: Time between two states.
        velocity: Velocity c = (c₀, c₁) along the first and second space axis.
        diffusivity: Diffusivity ν ≥ 0.

    Returns:
        `u -> u_next` on `(1, num_points, num_points)`, an exponax stepper.

    Raises:
        ValueError: If an argument is out of range; when called, if the state has
            another shape.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import make_advection_diffusion_2d_stepper
        >>> step = make_advection_diffusion_2d_stepper(8)
        >>> step(jnp.full((1, 8, 8), 2.0)).round(4).max().item()
        2.0
    """
    if not isinstance(velocity, Sequence) or isinstance(velocity, str):
        raise TypeError(
            f"Expected `velocity` as a pair of numbers, got {velocity!r}. "
            "Pass for example (1.0, 0.5)."
        )
    if len(velocity) != 2:
        raise ValueError(
            f"Expected 2 entries of `velocity`, one per space axis, got "
            f"{len(velocity)}. Pass for example (1.0, 0.5)."
        )
    velocity = [_check.finite(f"velocity[{i}]", c) for i, c in enumerate(velocity)]
    diffusivity = _check.non_negative("diffusivity", diffusivity)
    return build(
        exponax.stepper.AdvectionDiffusion,
        2,
        _check.positive("domain_extent", domain_extent),
        _check.count("num_points", num_points, minimum=4),
        _check.positive("dt", dt),
        velocity=jnp.asarray(velocity),
        diffusivity=jnp.full(2, diffusivity),
    )


def advection_diffusion_2d(
    num_points: int = 48,
    num_samples: int = 20,
    *,
    domain_extent: float = 2 * math.pi,
    dt: float = 0.05,
    velocity: Sequence[float] = (1.0, 0.5),
    diffusivity: float = 0.01,
    highest_init_mode: int = 5,
    init_std: float = 1.0,
    temporal_horizon: int = 100,
    key: PRNGKeyArray,
) -> Float[Array, "num_samples temporal_horizon 1 num_points num_points"]:
    """Trajectories of advection-diffusion from random Fourier modes.

    uₜ + c · ∇u = ν Δu on a periodic square, exact in time.

    Args:
        num_points: Number N of grid points per axis.
        num_samples: Number of trajectories.
        domain_extent: Length L of the square's side.
        dt: Time between two states.
        velocity: Velocity c = (c₀, c₁) along the first and second space axis.
        diffusivity: Diffusivity ν ≥ 0.
        highest_init_mode: Highest mode per axis of the initial condition, below N // 2.
        init_std: Standard deviation of the initial condition over space.
        temporal_horizon: Number of times, the initial condition included.
        key: Random key.

    Returns:
        `(num_samples, temporal_horizon, 1, num_points, num_points)`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax
        >>> from trainax_pk.sample_data import advection_diffusion_2d
        >>> key = jax.random.key(0)
        >>> advection_diffusion_2d(16, 2, temporal_horizon=5, key=key).shape
        (2, 5, 1, 16, 16)
    """
    stepper = make_advection_diffusion_2d_stepper(
        num_points,
        domain_extent=domain_extent,
        dt=dt,
        velocity=velocity,
        diffusivity=diffusivity,
    )
    mode = _check.mode("highest_init_mode", highest_init_mode, stepper.num_points)
    init_std = _check.positive("init_std", init_std)
    return simulate(
        stepper,
        RandomFourier(2, stepper.num_points, mode, init_std),
        key,
        num_samples=num_samples,
        temporal_horizon=temporal_horizon,
    )
