"""PyTree helpers that JAX and Equinox do not offer, and checks with our messages."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def global_norm_squared(tree: PyTree[Any]) -> Float[Array, ""]:
    """Sum of |x|² over all entries of all inexact leaves."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return sum((jnp.sum(jnp.real(x * jnp.conj(x))) for x in leaves), jnp.zeros(()))


def all_finite(tree: PyTree[Any]) -> Array:
    """True when no inexact leaf holds a NaN or an infinity."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    finite = jnp.array(True)  # noqa: FBT003
    for leaf in leaves:
        finite = finite & jnp.all(jnp.isfinite(leaf))
    return finite


def select(condition: Array, on_true: PyTree[Any], on_false: PyTree[Any]) -> PyTree:
    """`where`, leaf by leaf: unlike a product with 0 or 1 it lets no NaN through."""
    return jax.tree.map(
        lambda a, b: a if a is b else jnp.where(condition, a, b), on_true, on_false
    )


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
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ValueError(
            f"Expected `{name}` to be an integer >= {minimum}, got {value!r}. "
            f"Pass a Python int of at least {minimum}."
        )
    return value


def check_flag(name: str, value: Any) -> bool:
    """A Python bool, or a ValueError: a traced or integer flag hides a mistake."""
    if not isinstance(value, bool):
        raise ValueError(
            f"Expected `{name}` to be True or False, got {value!r}. Pass a Python bool."
        )
    return value


def check_weights(name: str, weights: Any, length: int, what: str) -> Array:
    """`length` real weights as an array; ones when None."""
    if weights is None:
        return jnp.ones(length)
    array = jnp.asarray(weights)
    if array.shape != (length,) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(
            f"Expected `{name}` to hold {length} real weights ({what}), got "
            f"{array.dtype}{list(array.shape)}. Pass one weight for each."
        )
    return array.astype(jnp.result_type(float)) if array.dtype.kind in "iub" else array
