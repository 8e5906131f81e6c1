"""Linear advection in one dimension, exact in time."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._initial import FourierSeries1D
from ._simulate import simulate


class _Advection1D(eqx.Module):
    num_points: int
    cfl: float

    def __call__(
        self, u: Float[Array, "*channels num_points"]
    ) -> Float[Array, "*channels num_points"]:
        if u.shape[-1] != self.num_points:
            raise ValueError(
                f"Expected a state with {self.num_points} points on the last axis, got "
                f"shape {u.shape}. Build the stepper for this resolution."
            )
        # One step shifts by cfl grid cells.
        wavenumber = jnp.fft.rfftfreq(self.num_points) * self.num_points * 2 * jnp.pi
        shift = jnp.exp(-1j * wavenumber * (self.cfl / self.num_points))
        shift = shift.reshape((1,) * (u.ndim - 1) + (-1,))
        return jnp.fft.irfft(jnp.fft.rfft(u) * shift, n=self.num_points)


def make_advection_1d_stepper(
    num_points: int = 30, *, cfl: float = 0.75
) -> Callable[[Float[Array, "1 num_points"]], Float[Array, "1 num_points"]]:
    """Stepper of uₜ + c uₓ = 0 on a periodic domain.

    Shifts the Fourier interpolant by `cfl` = c Δt / Δx grid cells. Exact for fields
    below the Nyquist mode. Costs two FFTs.

    Args:
        num_points: Number N of grid points.
        cfl: Grid cells travelled per step; negative travels to the left.

    Returns:
        `u -> u_next` on `(1, num_points)`.

    Raises:
        ValueError: If an argument is out of range, or a state has another resolution.
        TypeError: If an argument is not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import make_advection_1d_stepper
        >>> step = make_advection_1d_stepper(5, cfl=2.0)
        >>> step(jnp.array([[0.0, 1.0, 0.0, 0.0, 0.0]])).round(4).argmax().item()
        3
    """
    return _Advection1D(
        _check.count("num_points", num_points, minimum=2), _check.finite("cfl", cfl)
    )


def advection_1d_periodic(
    num_points: int = 30,
    num_samples: int = 20,
    *,
    cfl: float = 0.75,
    highest_init_mode: int = 5,
    temporal_horizon: int = 100,
    key: PRNGKeyArray,
) -> Float[Array, "num_samples temporal_horizon 1 num_points"]:
    """Trajectories of linear advection from random truncated Fourier series.

    uₜ + c uₓ = 0, periodic, from Σₖ aₖ sin(kx) + bₖ cos(kx) with aₖ, bₖ uniform in
    [−1, 1). The trajectories are exact, and those of trainax 0.0.2 for the same key.

    Args:
        num_points: Number N of grid points.
        num_samples: Number of trajectories.
        cfl: Grid cells travelled per step, c Δt / Δx.
        highest_init_mode: Highest mode of the initial condition, below N // 2.
        temporal_horizon: Number of times, the initial condition included.
        key: Random key.

    Returns:
        `(num_samples, temporal_horizon, 1, num_points)`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax
        >>> from trainax_pk.sample_data import advection_1d_periodic
        >>> advection_1d_periodic(key=jax.random.key(0)).shape
        (20, 100, 1, 30)
    """
    stepper = make_advection_1d_stepper(num_points, cfl=cfl)
    mode = _check.mode("highest_init_mode", highest_init_mode, stepper.num_points)
    return simulate(
        stepper,
        FourierSeries1D(stepper.num_points, mode),
        key,
        num_samples=num_samples,
        temporal_horizon=temporal_horizon,
    )
