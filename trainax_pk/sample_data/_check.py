"""Checks of the generators' arguments. Each returns the value in its plain type."""

import math
import operator
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp


def count(name: str, value: Any, *, minimum: int = 1) -> int:
    """An integer of at least `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(
            f"Expected an integer for `{name}`, got {value!r}. "
            "It fixes shapes, so it has to be a Python int."
        )
    if number < minimum:
        raise ValueError(
            f"Expected `{name}` of at least {minimum}, got {number}. Pass a larger one."
        )
    return number


def finite(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"Expected a number for `{name}`, got {value!r}. "
            "Pass a Python float; physics constants are fixed when a stepper is built."
        )
    if not math.isfinite(value):
        raise ValueError(
            f"Expected a finite `{name}`, got {value}. Pass a finite number."
        )
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number above zero."""
    number = finite(name, value)
    if number <= 0:
        raise ValueError(
            f"Expected a positive `{name}`, got {value}. Pass a number above 0."
        )
    return number


def non_negative(name: str, value: Any) -> float:
    """A finite number of at least zero."""
    number = finite(name, value)
    if number < 0:
        raise ValueError(
            f"Expected `{name}` of at least 0, got {value}. Pass 0 or a number above."
        )
    return number


def mode(name: str, value: Any, num_points: int) -> int:
    """A wavenumber that the grid resolves: 1 ≤ value < num_points // 2."""
    number = count(name, value)
    if number >= num_points // 2:
        raise ValueError(
            f"Expected `{name}` below num_points // 2 = {num_points // 2}, got "
            f"{number}. A higher wave is not resolved: lower it or refine the grid."
        )
    return number


def random_key(value: Any) -> jax.Array:
    """One JAX random key, typed or raw."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == jnp.uint32 and len(shape) == 1):
        got = type(value).__name__ if dtype is None else f"{dtype} of shape {shape}"
        raise TypeError(
            f"Expected one JAX random key for `key`, got {got}. "
            "Make one with `jax.random.key(0)`."
        )
    return value
