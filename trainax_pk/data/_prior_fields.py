"""Random initial conditions on periodic grids."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count
from trainax_pk.data._prior import AbstractPrior

_NO_DENSITY = (
    "Expected a prior with a density, got {}, whose draws lie on a lower-dimensional "
    "set of fields. Compare samples instead."
)


class FourierField(AbstractPrior):
    """Random truncated Fourier series on a periodic grid, without mean.

    u(x) = A Σ_κ a_κ exp(2πi κ·x), with |κᵢ| <= K on every axis, a_κ complex normal, and
    A such that a draw has the standard deviation `std` over the grid. A finer grid
    shows the same functions, since the coefficients do not depend on it.

    Attributes:
        num_points: Points per axis.
        num_space_axes: 1, 2 or 3.
        highest_mode: K, 1 <= K < num_points / 2.
        std: Standard deviation of every draw.
        num_channels: Independent channels C.

    Raises:
        ValueError: A count out of range, a grid that cannot show K modes.

    Example:
        >>> import jax
        >>> from trainax_pk.data import FourierField
        >>> u = FourierField(32, highest_mode=4).sample(jax.random.key(0))
        >>> u.shape, round(float(u.std()), 3)
        ((1, 32), 1.0)
    """

    num_points: int
    num_space_axes: int
    highest_mode: int
    std: float
    num_channels: int

    def __init__(
        self,
        num_points: int,
        *,
        num_space_axes: int = 1,
        highest_mode: int = 5,
        std: float = 1.0,
        num_channels: int = 1,
    ) -> None:
        """Checks the numbers.

        Args:
            num_points: Points per axis.
            num_space_axes: 1, 2 or 3.
            highest_mode: K.
            std: Standard deviation of every draw.
            num_channels: C.
        """
        self.num_points = check_count("num_points", num_points, minimum=3)
        self.num_space_axes = _check_axes(num_space_axes)
        self.highest_mode = check_count("highest_mode", highest_mode)
        self.std = _check_positive("std", std)
        self.num_channels = check_count("num_channels", num_channels)
        if 2 * highest_mode >= num_points:
            raise ValueError(
                f"Expected highest_mode < num_points / 2, got {highest_mode} on "
                f"{num_points} points. Pass fewer modes or more points."
            )

    def sample(self, key: PRNGKeyArray) -> Float[Array, "C *space"]:
        """One field, `(num_channels, *space)`."""
        keys = jax.random.split(key, self.num_channels)
        return jax.vmap(self._channel)(keys)

    def log_prob(self, value: Array) -> Float[Array, ""]:
        """Refused: the draws have no density on the grid."""
        raise ValueError(_NO_DENSITY.format("FourierField"))

    def _channel(self, key: PRNGKeyArray) -> Float[Array, "*space"]:
        modes = np.arange(-self.highest_mode, self.highest_mode + 1)
        real, imaginary = jax.random.normal(
            key, (2,) + (len(modes),) * self.num_space_axes
        )
        middle = (self.highest_mode,) * self.num_space_axes
        field = (real + 1j * imaginary).at[middle].set(0.0)
        phase = 2 * np.pi * modes[:, None] * np.arange(self.num_points)[None]
        waves = jnp.exp(1j * jnp.asarray(phase / self.num_points)).astype(field.dtype)
        for _ in range(self.num_space_axes):
            # Contracts the first mode axis and appends its space axis at the end.
            field = jnp.tensordot(
                field, waves, axes=(0, 0), precision=jax.lax.Precision.HIGHEST
            )
        return self.std * field.real / jnp.std(field.real)


class GaussianRandomField(AbstractPrior):
    """Stationary Gaussian field on a periodic grid with a Matérn-like spectrum.

    û(κ) = sqrt(S(κ)) w(κ), S(κ) ∝ (τ² + |2πκ/L|²)^{-α}, w white noise; S is scaled so
    that the variance of every point is `std`². With α > d/2 a draw is continuous. In
    double precision the covariance of two points is exact on the torus.

    Attributes:
        num_points: Points per axis.
        num_space_axes: 1, 2 or 3.
        alpha: α > 0, smoothness.
        tau: τ > 0, inverse length scale.
        std: Standard deviation of a point.
        extent: L, length of an axis.
        num_channels: Independent channels C.

    Raises:
        ValueError: A number out of range.

    Source: Lindgren, Rue & Lindström 2011, doi:10.1111/j.1467-9868.2011.00777.x; the
    form is that of Li et al. 2021, arXiv:2010.08895.

    Example:
        >>> import jax
        >>> from trainax_pk.data import GaussianRandomField
        >>> prior = GaussianRandomField(16, num_space_axes=2, alpha=2.5, tau=7.0)
        >>> prior.sample(jax.random.key(0)).shape
        (1, 16, 16)
    """

    num_points: int
    num_space_axes: int
    alpha: float
    tau: float
    std: float
    extent: float
    num_channels: int

    def __init__(
        self,
        num_points: int,
        *,
        num_space_axes: int = 1,
        alpha: float = 2.0,
        tau: float = 5.0,
        std: float = 1.0,
        extent: float = 1.0,
        num_channels: int = 1,
    ) -> None:
        """Checks the numbers.

        Args:
            num_points: Points per axis.
            num_space_axes: 1, 2 or 3.
            alpha: α.
            tau: τ.
            std: Standard deviation of a point.
            extent: L.
            num_channels: C.
        """
        self.num_points = check_count("num_points", num_points, minimum=2)
        self.num_space_axes = _check_axes(num_space_axes)
        self.alpha = _check_positive("alpha", alpha)
        self.tau = _check_positive("tau", tau)
        self.std = _check_positive("std", std)
        self.extent = _check_positive("extent", extent)
        self.num_channels = check_count("num_channels", num_channels)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "C *space"]:
        """One field, `(num_channels, *space)`."""
        space = (self.num_points,) * self.num_space_axes
        axes = tuple(range(1, self.num_space_axes + 1))
        noise = jax.random.normal(key, (self.num_channels, *space))
        modes = jnp.fft.fftn(noise, axes=axes)
        root = jnp.asarray(np.sqrt(self._spectrum()), noise.dtype)
        return jnp.fft.ifftn(modes * root[None], axes=axes).real

    def log_prob(self, value: Array) -> Float[Array, ""]:
        """log N(u; 0, C) with the covariance that the spectrum defines."""
        value = jnp.asarray(value)
        axes = tuple(range(1, self.num_space_axes + 1))
        spectrum = jnp.asarray(self._spectrum(), value.dtype)
        modes = jnp.fft.fftn(value, axes=axes, norm="ortho")
        power = modes.real**2 + modes.imag**2
        log_det = self.num_channels * jnp.sum(jnp.log(spectrum))
        size = self.num_channels * spectrum.size
        quadratic = jnp.sum(power / spectrum[None])
        return -0.5 * (quadratic + log_det + size * np.log(2 * np.pi))

    def _spectrum(self) -> np.ndarray:
        """Eigenvalues of the covariance; their mean is the variance of a point."""
        wavenumber = 2 * np.pi * np.fft.fftfreq(self.num_points, 1 / self.num_points)
        squared = np.zeros((1,) * self.num_space_axes)
        for axis in range(self.num_space_axes):
            shape = [1] * self.num_space_axes
            shape[axis] = -1
            squared = squared + ((wavenumber / self.extent) ** 2).reshape(shape)
        # Relative to the mode 0, so that large exponents do not underflow.
        spectrum = (1 + squared / self.tau**2) ** -self.alpha
        return self.std**2 * spectrum / spectrum.mean()


def _check_axes(num_space_axes: int) -> int:
    if check_count("num_space_axes", num_space_axes) > 3:
        raise ValueError(
            f"Expected `num_space_axes` to be 1, 2 or 3, got {num_space_axes}."
        )
    return num_space_axes


def _check_positive(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"Expected `{name}` to be a number > 0, got {value!r}. Pass a Python float."
        )
    return float(value)
