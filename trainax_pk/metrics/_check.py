"""What every metric asks of its two trajectories."""

import jax.numpy as jnp
from jaxtyping import Array


def check_trajectories(prediction: Array, reference: Array, *, min_ndim: int) -> None:
    """Raise unless both are `(num_samples, num_times, channels, *space)` of one shape.

    Raises:
        ValueError: If the shapes differ, there are fewer than `min_ndim` axes, or an
            axis is empty.
        TypeError: If one of them is not a real floating array.
    """
    for name, value in (("prediction", prediction), ("reference", reference)):
        dtype = getattr(value, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"Expected {name} to be a real floating array, got "
                f"{type(value).__name__ if dtype is None else dtype}. "
                "Metrics take one array; apply them per leaf of a PyTree."
            )
    shape = jnp.shape(prediction)
    if shape != jnp.shape(reference):
        raise ValueError(
            f"Expected prediction and reference of one shape, got {shape} and "
            f"{jnp.shape(reference)}. Cut both to the same samples and lead times."
        )
    if len(shape) < min_ndim or 0 in shape:
        axes = "num_samples, num_times, channels" + ", *space" * (min_ndim > 3)
        raise ValueError(
            f"Expected trajectories ({axes}) with no empty axis, got shape {shape}. "
            "Add the missing axes, with length 1 if need be."
        )
