"""Kuramoto-Sivashinsky equation in one dimension."""

from collections.abc import Callable

import exponax
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._exponax import build
from ._initial import RandomFourier
from ._simulate import simulate


def make_kuramoto_sivashinsky_1d_stepper(
    num_points: int = 160,
    *,
    domain_extent: float = 60.0,
    dt: float = 0.25,
    num_substeps: int = 1,
) -> Callable[[Float[Array, "1 num_points"]], Float[Array, "1 num_points"]]:
    """Stepper of the Kuramoto-Sivashinsky equation on a periodic domain.

    uₜ + ½ (u²)ₓ + uₓₓ + uₓₓₓₓ = 0 (conservative form; the mean is conserved). A small
    wave e^{iqx} grows at the rate q² − q⁴. Pseudo-spectral with the 2/3 rule, ETDRK4 in
    time: order 4, seen as about 3 while dt q⁴ of the finest energetic waves is large.

    Args:
        num_points: Number N of grid points; 2 N / L above 5 resolves the attractor.
        domain_extent: Length L of the domain; chaotic from about 22, extensively
            so from 60.
        dt: Time between two states.
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
        >>> from trainax_pk.sample_data import make_kuramoto_sivashinsky_1d_stepper
        >>> step = make_kuramoto_sivashinsky_1d_stepper(32)
        >>> abs(step(jnp.zeros((1, 32)))).max().item()
        0.0
    """
    num_substeps = _check.count("num_substeps", num_substeps)
    stepper = build(
        exponax.stepper.KuramotoSivashinskyConservative,
        1,
        _check.positive("domain_extent", domain_extent),
        _check.count("num_points", num_points, minimum=4),
        _check.positive("dt", dt) / num_substeps,
        order=4,
    )
    return exponax.RepeatedStepper(stepper, num_substeps)


def kuramoto_sivashinsky_1d(
    num_points: int = 160,
    num_samples: int = 20,
    *,
    domain_extent: float = 60.0,
    dt: float = 0.25,
    num_substeps: int = 1,
    highest_init_mode: int = 5,
    init_std: float = 1.0,
    temporal_horizon: int = 100,
    num_warmup_steps: int = 400,
    key: PRNGKeyArray,
) -> Float[Array, "num_samples temporal_horizon 1 num_points"]:
    """Trajectories of the Kuramoto-Sivashinsky equation on its attractor.

    uₜ + ½ (u²)ₓ + uₓₓ + uₓₓₓₓ = 0, periodic, without mean; see
    `make_kuramoto_sivashinsky_1d_stepper` for the scheme. Starts from random Fourier
    modes and steps onto the attractor, where the standard deviation is about 1.3.

    Args:
        num_points: Number N of grid points.
        num_samples: Number of trajectories.
        domain_extent: Length L of the domain.
        dt: Time between two states.
        num_substeps: Steps of length dt / num_substeps between two states.
        highest_init_mode: Highest mode of the start, below N // 2.
        init_std: Standard deviation of the start over space.
        temporal_horizon: Number of times, the first one included.
        num_warmup_steps: Steps before the first time that is returned; about 100 units
            of time (400 steps by default) reach the attractor.
        key: Random key.

    Returns:
        `(num_samples, temporal_horizon, 1, num_points)`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax
        >>> from trainax_pk.sample_data import kuramoto_sivashinsky_1d
        >>> key = jax.random.key(0)
        >>> kuramoto_sivashinsky_1d(64, 2, temporal_horizon=5, key=key).shape
        (2, 5, 1, 64)
    """
    stepper = make_kuramoto_sivashinsky_1d_stepper(
        num_points, domain_extent=domain_extent, dt=dt, num_substeps=num_substeps
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
