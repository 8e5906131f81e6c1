"""Kolmogorov flow: forced two-dimensional turbulence."""

import math
from collections.abc import Callable

import exponax
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._exponax import build
from ._initial import RandomFourier
from ._simulate import simulate


def make_kolmogorov_flow_2d_stepper(
    num_points: int = 64,
    *,
    domain_extent: float = 2 * math.pi,
    dt: float = 0.1,
    diffusivity: float = 0.01,
    drag: float = -0.1,
    injection_mode: int = 4,
    injection_scale: float = 1.0,
    num_substeps: int = 5,
) -> Callable[
    [Float[Array, "1 num_points num_points"]], Float[Array, "1 num_points num_points"]
]:
    """Stepper of the vorticity of Kolmogorov flow on a periodic square.

    ωₜ + v · ∇ω = ν Δω + λ ω − k γ cos(k y), with k = 2π m / L, ω = ∂ₓv_y − ∂_y v_x and
    x, y the first and second space axis: the curl of Navier-Stokes with the force
    γ sin(k y) along x. Without force (γ = 0) this is decaying turbulence.
    Pseudo-spectral with the 2/3 rule, ETDRK4 in time (order 4).

    Args:
        num_points: Number N of grid points per axis.
        domain_extent: Length L of the square's side.
        dt: Time between two states.
        diffusivity: Kinematic viscosity ν > 0; the Reynolds number is
            √γ / ν · (L / 2π)^{3/2}.
        drag: Linear drag λ ≤ 0, which drains the large scales.
        injection_mode: Mode m of the force, below N // 2.
        injection_scale: Amplitude γ of the force.
        num_substeps: Steps of length dt / num_substeps per call. Advection is explicit:
            max|v| dt / num_substeps has to stay below about L / N.

    Returns:
        `ω -> ω_next` on `(1, num_points, num_points)`, an exponax stepper.

    Raises:
        ValueError: If an argument is out of range; when called, if the state has
            another shape.
        TypeError: If an argument has the wrong type.

    Reference:
        Chandler and Kerswell 2013, doi:10.1017/jfm.2013.122; Kochkov et al. 2021,
        arXiv:2102.01010 (m = 4, λ = −0.1).

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import make_kolmogorov_flow_2d_stepper
        >>> step = make_kolmogorov_flow_2d_stepper(16)
        >>> step(jnp.zeros((1, 16, 16))).shape
        (1, 16, 16)
    """
    num_points = _check.count("num_points", num_points, minimum=4)
    num_substeps = _check.count("num_substeps", num_substeps)
    if _check.finite("drag", drag) > 0:
        raise ValueError(
            f"Expected a `drag` of at most 0, got {drag}. "
            "It multiplies ω on the right-hand side: a positive one feeds energy."
        )
    domain_extent = _check.positive("domain_extent", domain_extent)
    injection_scale = _check.finite("injection_scale", injection_scale)
    stepper = build(
        exponax.stepper.KolmogorovFlowVorticity,
        2,
        domain_extent,
        num_points,
        _check.positive("dt", dt) / num_substeps,
        diffusivity=_check.positive("diffusivity", diffusivity),
        # exponax takes v = (∂_y ψ, −∂ₓψ) with Δψ = ω, the opposite of the curl's sign.
        convection_scale=-1.0,
        # exponax's operator of order 0 is the sum of one identity per space axis.
        drag=float(drag) / 2,
        injection_mode=_check.mode("injection_mode", injection_mode, num_points),
        # exponax forces with m γ where the curl has k γ; the two differ off L = 2π.
        injection_scale=injection_scale * 2 * math.pi / domain_extent,
        order=4,
    )
    return exponax.RepeatedStepper(stepper, num_substeps)


def kolmogorov_flow_2d(
    num_points: int = 64,
    num_samples: int = 10,
    *,
    domain_extent: float = 2 * math.pi,
    dt: float = 0.1,
    diffusivity: float = 0.01,
    drag: float = -0.1,
    injection_mode: int = 4,
    injection_scale: float = 1.0,
    num_substeps: int = 5,
    highest_init_mode: int = 5,
    init_std: float = 1.0,
    temporal_horizon: int = 50,
    num_warmup_steps: int = 100,
    key: PRNGKeyArray,
) -> Float[Array, "num_samples temporal_horizon 1 num_points num_points"]:
    """Trajectories of the vorticity of Kolmogorov flow.

    See `make_kolmogorov_flow_2d_stepper` for the equations and the scheme. Starts from
    random Fourier modes of the vorticity and drops a spin-up.

    Args:
        num_points: Number N of grid points per axis.
        num_samples: Number of trajectories.
        domain_extent: Length L of the square's side.
        dt: Time between two states.
        diffusivity: Kinematic viscosity ν > 0.
        drag: Linear drag λ ≤ 0.
        injection_mode: Mode m of the force, below N // 2.
        injection_scale: Amplitude γ of the force.
        num_substeps: Steps of length dt / num_substeps between two states.
        highest_init_mode: Highest mode per axis of the start, below N // 2.
        init_std: Standard deviation of the start over space.
        temporal_horizon: Number of times, the first one included.
        num_warmup_steps: Steps before the first time that is returned.
        key: Random key.

    Returns:
        `(num_samples, temporal_horizon, 1, num_points, num_points)`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax
        >>> from trainax_pk.sample_data import kolmogorov_flow_2d
        >>> kolmogorov_flow_2d(
        ...     16, 2, temporal_horizon=3, num_warmup_steps=2, key=jax.random.key(0)
        ... ).shape
        (2, 3, 1, 16, 16)
    """
    stepper = make_kolmogorov_flow_2d_stepper(
        num_points,
        domain_extent=domain_extent,
        dt=dt,
        diffusivity=diffusivity,
        drag=drag,
        injection_mode=injection_mode,
        injection_scale=injection_scale,
        num_substeps=num_substeps,
    )
    mode = _check.mode("highest_init_mode", highest_init_mode, stepper.num_points)
    init_std = _check.positive("init_std", init_std)
    return simulate(
        stepper,
        RandomFourier(2, stepper.num_points, mode, init_std),
        key,
        num_samples=num_samples,
        temporal_horizon=temporal_horizon,
        num_warmup_steps=num_warmup_steps,
    )
