"""Normalised error per lead time, and its geometric mean."""

import operator
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._check import check_trajectories


def nrmse_per_lead_time(
    prediction: Float[Array, "num_samples num_times channels *space"],
    reference: Float[Array, "num_samples num_times channels *space"],
    *,
    channels: Literal["joint", "sum"] = "joint",
) -> Float[Array, "num_times"]:
    """Root mean squared error relative to the reference, mean over samples.

    (1/S) Σ_s ‖p_s(t) − r_s(t)‖ / ‖r_s(t)‖, with the Euclidean norm over channels and
    space. One is the error of predicting zero.

    Args:
        prediction: Trajectories `(num_samples, num_times, channels, *space)`.
        reference: Trajectories of the same shape. A time at which one vanishes
            everywhere gives inf or NaN.
        channels: `"joint"` takes one ratio over all channels. `"sum"` takes a ratio
            per channel and adds them up, which is what exponax and APEBench report;
            the two agree for one channel.

    Returns:
        `(num_times,)`.

    Raises:
        ValueError: If the shapes do not match, or `channels` is unknown.
        TypeError: If an argument is not a real floating array.

    Reference:
        Koehler et al. 2024, APEBench, arXiv:2411.00180.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import nrmse_per_lead_time
        >>> reference = jnp.full((2, 3, 1, 8), 2.0)
        >>> drift = jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> nrmse_per_lead_time(reference + drift, reference).tolist()
        [0.0, 0.5, 1.0]
    """
    check_trajectories(prediction, reference, min_ndim=3)
    if channels not in ("joint", "sum"):
        raise ValueError(
            f"Expected channels='joint' or 'sum', got {channels!r}. "
            "'sum' is the convention of exponax and APEBench."
        )
    num_samples, num_times = reference.shape[:2]
    # (samples, times, groups, entries): one group, or one per channel.
    groups = 1 if channels == "joint" else reference.shape[2]
    grouped = (num_samples, num_times, groups, -1)
    error = jnp.linalg.norm((prediction - reference).reshape(grouped), axis=-1)
    scale = jnp.linalg.norm(reference.reshape(grouped), axis=-1)
    return jnp.mean(jnp.sum(error / scale, axis=-1), axis=0)


def geometric_mean(
    errors: Float[Array, "num_times *rest"], *, horizon: int | None = 100
) -> Float[Array, "*rest"]:
    """Geometric mean of an error over the first lead times.

    (∏_{t<h} e_t)^{1/h}: one number for a rollout whose error grows by orders of
    magnitude. APEBench's GMean is this over the mean nRMSE of the first 100 leads. A
    single zero makes it zero, so leave the initial condition out.

    Args:
        errors: Non-negative errors, lead time first. A negative entry gives NaN.
        horizon: Number h of leads, counted from the first entry, or None for all.

    Returns:
        The mean; further axes are kept.

    Raises:
        ValueError: If there are fewer than `horizon` leads, or `horizon` is below 1.
        TypeError: If `horizon` is not an integer.

    Reference:
        Koehler et al. 2024, APEBench, arXiv:2411.00180.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import geometric_mean
        >>> round(float(geometric_mean(jnp.array([0.01, 1.0, 7.0]), horizon=2)), 6)
        0.1
    """
    errors = jnp.asarray(errors)
    num_times = errors.shape[0] if errors.ndim else 0
    if num_times == 0:
        raise ValueError(
            f"Expected errors with lead times on the first axis, got shape "
            f"{errors.shape}. Pass for example the result of nrmse_per_lead_time."
        )
    if horizon is None:
        horizon = num_times
    try:
        horizon = operator.index(horizon)
    except TypeError:
        raise TypeError(
            f"Expected an integer `horizon` or None, got {horizon!r}. "
            "It counts lead times."
        ) from None
    if not 1 <= horizon <= num_times:
        raise ValueError(
            f"Expected a `horizon` from 1 to the {num_times} lead times given, got "
            f"{horizon}. Roll out longer, or pass `horizon=None` for all."
        )
    # In logarithms: the product of 100 small errors underflows.
    return jnp.exp(jnp.mean(jnp.log(errors[:horizon]), axis=0))
