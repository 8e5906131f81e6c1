"""Standardisation that is learned from data once and stored in the model."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trainax_pk.amortized._frozen import Frozen


class Standardisation(eqx.Module):
    """x ↦ (x − mean) / std; neither trains.

    Attributes:
        mean: Of a shape that broadcasts to x with its number of axes.
        std: Likewise, positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import Standardisation
        >>> scale = Standardisation(jnp.array([1.0]), jnp.array([2.0]))
        >>> float(scale(jnp.array([5.0]))[0]), float(scale.inverse(jnp.array([2.0]))[0])
        (2.0, 5.0)
    """

    mean: Frozen
    std: Frozen

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = Frozen(mean), Frozen(std)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Standardises one sample."""
        mean, std = self._like(x)
        return (x - mean) / std

    def inverse(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Undoes it."""
        mean, std = self._like(x)
        return mean + std * x

    def log_det(self, shape: tuple[int, ...]) -> Float[Array, ""]:
        """Σ log |d standardised / d x| over a sample of a shape."""
        return -jnp.sum(jnp.broadcast_to(jnp.log(self.std.value), shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of mean and standard deviation."""
        return self.mean.bits.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it broadcasts to a shape."""
        axes = zip(self.shape[::-1], shape[::-1], strict=False)
        return len(self.shape) <= len(shape) and all(n in (1, m) for n, m in axes)

    def spread(self, shape: tuple[int, ...]) -> "Standardisation":
        """The same, repeated to a shape that it broadcasts to; else as it is."""
        if not self.fits(shape):
            return self
        return Standardisation(
            *(jnp.broadcast_to(s.value, shape) for s in (self.mean, self.std))
        )

    def _like(self, x: Array) -> tuple[Array, Array]:
        return tuple(
            jnp.broadcast_to(s.value.astype(x.dtype), x.shape)
            for s in (self.mean, self.std)
        )


def fit_standardisation(
    x: Any, mask: Any = None, shared_axes: tuple[int, ...] = ()
) -> Standardisation:
    """Mean and standard deviation over samples, entry by entry.

    Args:
        x: `(N, ...)`, concrete.
        mask: Of the same shape: which entries count. None for all.
        shared_axes: Axes of one sample (0 is the first after N) along which entries have
            statistics in common.

    Returns:
        The standardisation; entries that never vary, or are never seen, keep the
        standard deviation 1.

    Raises:
        ValueError: An axis that a sample does not have.

    Example:
        >>> import numpy as np
        >>> from trainax_pk.amortized import fit_standardisation
        >>> fit_standardisation(np.array([[0.0], [4.0]])).std.value.tolist()
        [2.0]
    """
    values = np.asarray(x, np.float64)
    if any(not -values.ndim < axis < values.ndim - 1 for axis in shared_axes):
        raise ValueError(
            f"Expected `shared_axes` among the {values.ndim - 1} axes of a sample, got "
            f"{shared_axes}. Count from 0, without the axis of samples."
        )
    axes = (0, *((axis % (values.ndim - 1)) + 1 for axis in shared_axes))
    seen = np.ones(values.shape, bool) if mask is None else np.asarray(mask, bool)
    count = np.maximum(seen.sum(axis=axes, keepdims=True), 1)
    # Selected and not multiplied: what the mask leaves out may be NaN.
    mean = np.where(seen, values, 0.0).sum(axis=axes, keepdims=True) / count
    squares = np.where(seen, (values - mean) ** 2, 0.0)
    std = np.sqrt(squares.sum(axis=axes, keepdims=True) / count)
    # Below the rounding of the mean, differences are noise.
    least = 1e-6 * np.abs(mean)
    dtype = jnp.result_type(float)
    std = np.where(std > least, std, 1.0)
    return Standardisation(jnp.asarray(mean[0], dtype), jnp.asarray(std[0], dtype))
