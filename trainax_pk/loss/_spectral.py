"""Losses that weigh the error by wavenumber, on a periodic domain."""

import functools
import math
import operator
from collections.abc import Callable
from numbers import Real

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._fourier import mode_power
from ._compare import difference, mean_over_entries


def h1(*, domain_extent: float = 1.0, weight: float = 1.0) -> Callable[..., Array]:
    """Mean squared error of the values plus that of the spectral gradient.

    mean(e²) + w · mean(|∇e|²) with e = p − t and ∇ the derivative of the Fourier
    interpolant: Σ_κ (1 + w |2πκ/L|²) |ê_κ|² by Parseval. The Nyquist mode counts with
    its full wavenumber, so that grid-scale oscillations are not free of charge.

    The same arguments give the same function object: a configuration that is built
    again does not trace again.

    Args:
        domain_extent: Length L of the periodic domain, the same on every space axis.
        weight: Weight w ≥ 0 of the gradient, in units of length².

    Returns:
        Loss `(prediction, target=None) -> scalar`; leaves `(channels, *space)`, real.
        Costs one real FFT of the error.

    Raises:
        ValueError: If `domain_extent` is not positive or `weight` is negative; when
            called, if a leaf has no space axis, or prediction and target do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> x = 2 * jnp.pi * jnp.arange(16) / 16
        >>> h1 = loss.h1(domain_extent=2 * jnp.pi, weight=0.5)
        >>> round(float(h1(jnp.sin(3 * x)[None])), 4)  # 1/2 + 0.5 · 9/2
        2.75
    """
    domain_extent = _finite("domain_extent", domain_extent)
    weight = _finite("weight", weight)
    if domain_extent <= 0:
        raise ValueError(
            f"Expected a positive `domain_extent`, got {domain_extent}. "
            "Pass the length of the periodic domain."
        )
    if weight < 0:
        raise ValueError(
            f"Expected `weight` of at least 0, got {weight}. A negative weight rewards "
            "a wrong gradient and leaves the loss without a minimum."
        )
    return _h1(domain_extent, weight)


def spectral_band(low: int, high: int | None = None) -> Callable[..., Array]:
    """Mean squared error of the field filtered to a band of wavenumbers.

    Σ |ê_κ|² over the modes with low − ½ ≤ |κ| < high + ½, where |κ| is the Euclidean
    norm of the wavenumber in periods per domain. Bands that tile 0, 1, … without gap,
    the last one open (`high=None`), sum to `mse` exactly (Parseval).

    The same arguments give the same function object: a configuration that is built
    again does not trace again.

    Args:
        low: Lowest wavenumber of the band, ≥ 0. 0 includes the mean.
        high: Highest wavenumber, inclusive, or None for no upper end. In more than one
            dimension the grid has modes above N/2, in the corners.

    Returns:
        Loss `(prediction, target=None) -> scalar`; leaves `(channels, *space)`, real.
        Costs one real FFT of the error.

    Raises:
        ValueError: Unless 0 ≤ low ≤ high; when called, if a leaf has no space axis, or
            prediction and target do not match.
        TypeError: If a bound is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> x = 2 * jnp.pi * jnp.arange(16) / 16
        >>> u = (2 * jnp.sin(x) + jnp.sin(5 * x))[None]
        >>> [round(float(loss.spectral_band(*b)(u)), 4) for b in [(0, 3), (4, None)]]
        [2.0, 0.5]
    """
    low = _integer("low", low)
    if high is not None:
        high = _integer("high", high)
    if low < 0 or (high is not None and high < low):
        raise ValueError(
            f"Expected 0 <= low <= high, got {low=} and {high=}. "
            "Both ends belong to the band; `high=None` leaves it open."
        )
    return _spectral_band(low, high)


# Cached, because a function is compared by identity when jit looks for a known trace.
@functools.cache
def _h1(domain_extent: float, weight: float) -> Callable[..., Array]:
    factor = weight * (2 * math.pi / domain_extent) ** 2

    def h1_loss(
        prediction: PyTree[Array], target: PyTree[Array] | None = None
    ) -> Float[Array, ""]:
        return _by_wavenumber(lambda k2: 1.0 + factor * k2, prediction, target)

    return h1_loss


@functools.cache
def _spectral_band(low: int, high: int | None) -> Callable[..., Array]:
    def in_band(k2: Int[Array, "*modes"]) -> Array:
        # |κ| ≥ low − ½ in integers: 4|κ|² is a multiple of 4 and (2 low − 1)² is not,
        # so no mode lies on an edge and none is counted twice or lost by rounding.
        mask = 4 * k2 > (2 * low - 1) ** 2 if low > 0 else k2 >= 0
        return mask if high is None else mask & (4 * k2 < (2 * high + 1) ** 2)

    def spectral_band_loss(
        prediction: PyTree[Array], target: PyTree[Array] | None = None
    ) -> Float[Array, ""]:
        return _by_wavenumber(in_band, prediction, target)

    return spectral_band_loss


def _by_wavenumber(
    weigh: Callable[[Int[Array, "*modes"]], Array],
    prediction: PyTree[Array],
    target: PyTree[Array] | None,
) -> Float[Array, ""]:
    def leaf_mean(error: Array) -> Float[Array, ""]:
        squared_wavenumber, power = mode_power(error)
        weights = weigh(squared_wavenumber).astype(power.dtype)
        per_channel = jnp.sum(power * weights[None], axis=tuple(range(1, power.ndim)))
        return jnp.mean(per_channel)

    return mean_over_entries(leaf_mean, difference(prediction, target))


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"Expected a number for `{name}`, got {type(value).__name__}. "
            "Pass a Python float; it is fixed when the loss is built."
        )
    if not math.isfinite(value):
        raise ValueError(
            f"Expected a finite `{name}`, got {value}. Pass a finite number."
        )
    return float(value)


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"Expected an integer for `{name}`, got {value!r}. "
            "Wavenumbers count periods per domain."
        ) from None
