"""PyTree helpers that JAX and Equinox do not offer, and checks with our messages."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree


def global_norm_squared(tree: PyTree[Any]) -> Float[Array, ""]:
    """Sum of |x|² over all entries of all inexact leaves."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return sum((_sum_of_squares(x) for x in leaves), jnp.zeros(()))


def _sum_of_squares(x: Array) -> Float[Array, ""]:
    squares = jnp.real(x * jnp.conj(x))
    if x.ndim < 2 or x.size < 256:
        return jnp.sum(squares)
    # Left whole, XLA sums a small matrix on a CPU one entry after another; columns are
    # summed side by side, in a tenth of the time, if the barrier keeps the sums apart.
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(squares, axis=0)))


def global_norm(tree: PyTree[Any]) -> Float[Array, ""]:
    """Euclidean norm of all entries of all inexact leaves.

    What is squared is at most 1 in magnitude, so that neither large nor small entries
    are lost: it is finite where the entries and the norm itself are. Its derivative at
    0 is 0.
    """
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    largest = jnp.zeros(())
    for leaf in leaves:
        if leaf.size:
            largest = jnp.maximum(largest, jnp.max(jnp.abs(leaf)))
    largest = jax.lax.stop_gradient(largest)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return unit * plain_norm([x / unit.astype(x.real.dtype) for x in leaves])


def plain_norm(tree: PyTree[Any]) -> Float[Array, ""]:
    """`global_norm` without its scaling: for half the cost, squares may overflow."""
    total = global_norm_squared(tree)
    positive = total > 0
    root = jnp.sqrt(jnp.where(positive, total, 1.0))
    # NaN is not positive, and must not become 0.
    return jnp.where(positive, root, jnp.where(total == 0, 0.0, total))


def select(condition: Array, on_true: PyTree[Any], on_false: PyTree[Any]) -> PyTree:
    """`where`, leaf by leaf: unlike a product with 0 or 1 it lets no NaN through."""
    return jax.tree.map(
        lambda a, b: a if a is b else jnp.where(condition, a, b), on_true, on_false
    )


def stays_finite(new: PyTree[Any], old: PyTree[Any]) -> Bool[Array, ""]:
    """Whether every entry is finite or what it was: a mask of -inf may stay."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    kept = [jnp.all(jnp.isfinite(a) | (a == b)) for a, b in pairs]
    return jnp.all(jnp.stack(kept)) if kept else jnp.ones((), bool)


def cast_floating(tree: PyTree[Any], dtype: Any) -> PyTree[Any]:
    """Real floating leaves in another precision; every other leaf as it is."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if is_floating(x) else x,
        tree,
    )


def is_floating(x: Any) -> bool:
    """Whether a leaf is a real floating array."""
    return eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def describe(tree: PyTree[Any]) -> str:
    """Shapes and dtypes of the leaves, for error messages."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [
        f"{jax.tree_util.keystr(path) or 'state'}: {x.dtype}{list(x.shape)}"
        for path, x in leaves
        if hasattr(x, "shape")
    ]
    return ", ".join(named) or "no arrays"


def check_count(name: str, value: Any, *, minimum: int = 1) -> int:
    """An integer of at least `minimum`, or a ValueError that names it."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ValueError(
            f"Expected `{name}` to be an integer >= {minimum}, got {value!r}. "
            f"Pass an int of at least {minimum}."
        )
    return int(value)


def as_int(value: Any) -> Any:
    """NumPy's integers as Python's, for fields; the rest is for `check_count` to judge."""
    return int(value) if isinstance(value, np.integer) else value


def as_lengths(value: Any) -> tuple[Any, ...] | None:
    """Entries of a sequence or of an array of one axis; None of anything else."""
    if isinstance(value, np.ndarray | jax.Array) and is_concrete(value):
        return tuple(value.tolist()) if value.ndim == 1 else None
    return tuple(value) if isinstance(value, Sequence) else None


def as_number(value: Any) -> Any:
    """An array of no axes as a Python number, for fields; the rest stays as it is."""
    is_scalar = isinstance(value, np.ndarray | np.generic | jax.Array)
    known = is_scalar and is_concrete(value) and value.ndim == 0
    return float(value) if known and value.dtype.kind in "iuf" else value


def check_flag(name: str, value: Any) -> bool:
    """A Python bool, or a ValueError: a traced or integer flag hides a mistake."""
    if not isinstance(value, bool):
        raise ValueError(
            f"Expected `{name}` to be True or False, got {value!r}. Pass a Python bool."
        )
    return value


def check_average(use_ema: Any) -> bool | int:
    """Whether to use a moving average, or which of several; else a ValueError."""
    if isinstance(use_ema, bool):
        return use_ema
    return check_count("use_ema", use_ema)


def check_weights(name: str, weights: Any, length: int, what: str) -> Array:
    """`length` real weights as an array; ones when None."""
    if weights is None:
        return jnp.ones(length)
    try:
        array = jnp.asarray(weights)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `{name}` to hold {length} real weights ({what}), got "
            f"{weights!r}. Pass one number for each."
        ) from error
    if array.shape != (length,) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(
            f"Expected `{name}` to hold {length} real weights ({what}), got "
            f"{array.dtype}{list(array.shape)}. Pass one weight for each."
        )
    if is_concrete(array) and not np.isfinite(np.asarray(array)).all():
        raise ValueError(
            f"Expected `{name}` to be finite, got {array}. A weight of 0 leaves a term "
            "out."
        )
    return array.astype(jnp.result_type(float)) if array.dtype.kind in "iub" else array


def is_concrete(x: Any) -> bool:
    """Whether a value is known now, so that it can be checked."""
    return not isinstance(x, jax.core.Tracer)
