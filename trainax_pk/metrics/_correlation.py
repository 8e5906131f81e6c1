"""Correlation of prediction and reference, and how long it lasts."""

from numbers import Real

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._check import check_trajectories


def correlation_per_lead_time(
    prediction: Float[Array, "num_samples num_times channels *space"],
    reference: Float[Array, "num_samples num_times channels *space"],
) -> Float[Array, "num_times"]:
    """Correlation of the fields, mean over channels and samples.

    ⟨p, r⟩ / (‖p‖ ‖r‖) over space, per channel; the mean is not subtracted, as in
    exponax and APEBench. 1 for a prediction that is right up to a positive factor. NaN
    where a field vanishes or has blown up.

    Args:
        prediction: Trajectories `(num_samples, num_times, channels, *space)` with at
            least one space axis.
        reference: Trajectories of the same shape.

    Returns:
        `(num_times,)`, entries in [−1, 1].

    Raises:
        ValueError: If the shapes do not match or there is no space axis.
        TypeError: If an argument is not a real floating array.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import correlation_per_lead_time
        >>> r = jnp.sin(jnp.arange(12.0)).reshape(1, 2, 1, 6)
        >>> correlation_per_lead_time(3 * r, r).round(4).tolist()
        [1.0, 1.0]
    """
    return jnp.mean(_correlation(prediction, reference), axis=(0, 2))


def correlation_time(
    prediction: Float[Array, "num_samples num_times channels *space"],
    reference: Float[Array, "num_samples num_times channels *space"],
    threshold: float = 0.8,
    *,
    interpolate: bool = True,
) -> Float[Array, ""]:
    """First lead at which the mean correlation falls below a threshold.

    Counted in entries of the time axis from its first, index 0: if the trajectories
    hold the initial condition, this is the number of steps; multiply by dt for a time.
    Between the last entry at or above the threshold and the first below, the crossing
    is interpolated linearly. A sample whose correlation is not a number (a rollout
    that blew up) counts as uncorrelated, 0, from there on.

    Args:
        prediction: Trajectories `(num_samples, num_times, channels, *space)` with at
            least one space axis.
        reference: Trajectories of the same shape.
        threshold: Correlation below which the prediction counts as lost, in (−1, 1).
        interpolate: If False, the index of the first entry below the threshold.

    Returns:
        Scalar in [0, num_times − 1], or inf if the correlation never falls below.

    Raises:
        ValueError: If the shapes do not match, there is no space axis, or the
            threshold is out of range.
        TypeError: If an argument is not a real floating array, or the threshold is
            not a number.

    Reference:
        Kochkov et al. 2021, arXiv:2102.01010 (correlation of vorticity above 0.95);
        Lippe et al. 2023, arXiv:2308.05732 (time to 0.8).

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import correlation_time
        >>> reference = jnp.tile(jnp.array([1.0, 0.0]), (1, 3, 1, 1))
        >>> prediction = jnp.array([[[[1.0, 0.0]], [[1.0, 0.0]], [[0.6, 0.8]]]])
        >>> round(float(correlation_time(prediction, reference)), 4)
        1.5
    """
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(
            f"Expected a number for `threshold`, got {type(threshold).__name__}. "
            "Pass for example 0.8."
        )
    if not -1 < threshold < 1:
        raise ValueError(
            f"Expected a `threshold` between -1 and 1, got {threshold}. "
            "Correlations outside do not exist, so nothing could cross it."
        )
    correlation = jnp.nan_to_num(_correlation(prediction, reference), nan=0.0)
    mean = jnp.mean(correlation, axis=(0, 2))
    below = mean < threshold
    first = jnp.argmax(below)
    lead = first.astype(mean.dtype)
    if interpolate:
        before, after = mean[jnp.maximum(first - 1, 0)], mean[first]
        drop = jnp.where(before > after, before - after, 1.0)
        lead = jnp.where(first == 0, lead, lead - (threshold - after) / drop)
    return jnp.where(jnp.any(below), lead, jnp.inf)


def _correlation(
    prediction: Array, reference: Array
) -> Float[Array, "num_samples num_times channels"]:
    check_trajectories(prediction, reference, min_ndim=4)
    flat = (*reference.shape[:3], -1)
    p, r = prediction.reshape(flat), reference.reshape(flat)
    # Each field by its own norm first: the product of two norms overflows sooner.
    p = p / jnp.linalg.norm(p, axis=-1, keepdims=True)
    r = r / jnp.linalg.norm(r, axis=-1, keepdims=True)
    return jnp.sum(p * r, axis=-1)
