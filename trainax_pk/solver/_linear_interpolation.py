"""The simplest reconstruction: straight lines in time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trainax_pk.solver._windows import check_window


def linear_interpolation(
    observed: Float[Array, "num_times *state"],
    mask: Bool[Array, "num_times *state"],
    *,
    fill: Any = 0.0,
) -> Float[Array, "num_times *state"]:
    """Linear interpolation in time of each entry of the state on its own.

    Before its first and after its last observation an entry is constant. What a learned
    solver has to beat, and where it starts from.

    Args:
        observed: Observations of one window; what stands under the mask is ignored.
        mask: Where the window was observed.
        fill: Value of an entry that was never observed: a number, or one for each
            entry, `(*state)`. A climatological mean is the fair choice.

    Returns:
        The window without gaps. Cost: O(num_times) for each entry, one pass.

    Raises:
        ValueError: Shapes that differ, a mask that is not boolean, NaN where the mask
            is True.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import linear_interpolation
        >>> observed = jnp.array([[0.0], [1.0], [0.0], [3.0], [0.0]])
        >>> mask = jnp.array([[False], [True], [False], [True], [False]])
        >>> linear_interpolation(observed, mask)[:, 0].tolist()
        [1.0, 1.0, 2.0, 3.0, 3.0]
    """
    observed, mask = check_window(observed, mask)
    num_times = observed.shape[0]
    fill = jnp.asarray(fill, observed.dtype)
    if fill.shape not in ((), observed.shape[1:]):
        raise ValueError(
            f"Expected `fill` to be a number or of shape {observed.shape[1:]}, got "
            f"shape {fill.shape}. Give one value for each entry of the state."
        )
    times = jnp.arange(num_times).reshape(-1, *[1] * (observed.ndim - 1))
    times = jnp.broadcast_to(times, observed.shape)
    before = jax.lax.cummax(jnp.where(mask, times, -1), axis=0)
    after = jax.lax.cummin(jnp.where(mask, times, num_times), axis=0, reverse=True)
    # At the edges both ends are the one observation there is.
    left = jnp.where(before < 0, after, before)
    right = jnp.where(after == num_times, before, after)
    seen = (left < num_times) & (right >= 0)
    left, right = jnp.where(seen, left, 0), jnp.where(seen, right, 0)
    start = jnp.take_along_axis(observed, left, axis=0)
    end = jnp.take_along_axis(observed, right, axis=0)
    length = jnp.maximum(right - left, 1).astype(observed.dtype)
    share = (times - left).astype(observed.dtype) / length
    line = start + jnp.clip(share, 0.0, 1.0) * (end - start)
    return jnp.where(seen, line, jnp.broadcast_to(fill, observed.shape[1:])[None])
