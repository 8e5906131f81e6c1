"""Difference of two states, and the mean over the entries of a state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def difference(
    prediction: PyTree[Array], target: PyTree[Array] | None
) -> PyTree[Array]:
    """`prediction - target`, leaf by leaf, or the prediction if there is no target.

    Args:
        prediction: State, leaves of any shape with a floating or complex dtype.
        target: State of the same structure, shapes and dtypes, or None.

    Returns:
        PyTree of the structure of `prediction`.

    Raises:
        ValueError: If there is nothing to compare, or if the two do not match.
        TypeError: If a leaf is not an array of floating or complex dtype.
    """
    _check_leaves(prediction, "prediction")
    if target is None:
        return prediction
    _check_leaves(target, "target")
    expected, got = jax.tree.structure(prediction), jax.tree.structure(target)
    if expected != got:
        raise ValueError(
            f"Expected a target of the prediction's structure {expected}, got {got}. "
            "Return the state from the model in the container that the data uses."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(prediction),
        jax.tree.leaves(target),
        strict=True,
    )
    for (path, p), t in pairs:
        where = jax.tree_util.keystr(path)
        # Broadcasting would average over pairs that do not belong together.
        if jnp.shape(p) != jnp.shape(t):
            raise ValueError(
                f"Expected a target{where} of the prediction's shape {jnp.shape(p)}, "
                f"got {jnp.shape(t)}. Check channel and space axes of model and data."
            )
        if jnp.result_type(p) != jnp.result_type(t):
            raise ValueError(
                f"Expected a target{where} of the prediction's dtype "
                f"{jnp.result_type(p)}, got {jnp.result_type(t)}. Cast one of them."
            )
    return jax.tree.map(jnp.subtract, prediction, target)


def mean_over_entries(
    entry_mean: Callable[[Array], Float[Array, ""]], tree: PyTree[Array]
) -> Float[Array, ""]:
    """Mean over all entries of all leaves, from the mean over each leaf.

    Args:
        entry_mean: Mean over the entries of one leaf, of what is to be averaged.
        tree: PyTree with at least one leaf.

    Returns:
        Σᵢ (nᵢ / n) · entry_mean(leafᵢ) with nᵢ entries in leaf i.
    """
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.size(leaf) for leaf in leaves)
    # Weights times means and not a sum by a count: sums overflow in half precision.
    return sum(jnp.size(leaf) / total * entry_mean(leaf) for leaf in leaves)


def _check_leaves(tree: Any, name: str) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(
            f"Expected a {name} with at least one array leaf, got {tree!r}. "
            "Pass an array or a PyTree of arrays."
        )
    for path, leaf in leaves:
        where = jax.tree_util.keystr(path)
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"Expected {name}{where} to be a floating or complex array, got "
                f"{type(leaf).__name__ if dtype is None else dtype}. "
                "Convert it with `jnp.asarray(x, float)`."
            )
        if jnp.size(leaf) == 0:
            raise ValueError(
                f"Expected {name}{where} to have at least one entry, got shape "
                f"{jnp.shape(leaf)}. The mean over nothing is not a number."
            )
