"""How one gradient agrees with another: direction, length, difference."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree


class Agreement(eqx.Module):
    """Agreement of a gradient g with a reference r.

    Attributes:
        cosine: ⟨g, r⟩ / (|g| |r|); 1 where both are zero, 0 where one is.
        norm_ratio: |g| / |r|; 1 where both are zero.
        relative_error: |g - r| / |r|; 0 where both are zero, infinite where r alone is.
    """

    cosine: float
    norm_ratio: float
    relative_error: float


def agreement(gradient: PyTree[Any], reference: PyTree[Any]) -> Agreement:
    """Agreement over all leaves taken together. Not finite entries make it NaN."""
    return _of_vectors(_flat(gradient), _flat(reference))


def of_leaves(gradient: PyTree[Any], reference: PyTree[Any]) -> dict[str, Agreement]:
    """Agreement of each leaf, by its path."""
    named = jax.tree_util.tree_leaves_with_path(gradient)
    others = jax.tree.leaves(reference)
    return {
        jax.tree_util.keystr(path) or "value": agreement(leaf, other)
        for (path, leaf), other in zip(named, others, strict=True)
    }


def _flat(tree: PyTree[Any]) -> np.ndarray:
    """One real vector: complex entries are pairs."""
    pieces = [np.asarray(x).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(
        [np.concatenate([x.real, x.imag]) if np.iscomplexobj(x) else x for x in pieces]
    ).astype(np.float64)


def _of_vectors(g: np.ndarray, r: np.ndarray) -> Agreement:
    if not (np.isfinite(g).all() and np.isfinite(r).all()):
        return Agreement(np.nan, np.nan, np.nan)
    # Squares of entries may be out of range though their ratios are not.
    size, g = _normalised(g)
    other, r = _normalised(r)
    if size == 0 and other == 0:
        return Agreement(1.0, 1.0, 0.0)
    if other == 0:
        return Agreement(0.0, np.inf, np.inf)
    ratio = float(size / other)
    return Agreement(float(g @ r), ratio, float(np.linalg.norm(ratio * g - r)))


def _normalised(x: np.ndarray) -> tuple[np.floating[Any] | float, np.ndarray]:
    """Norm and direction; zeros keep their direction of zero."""
    largest = np.abs(x).max(initial=0.0)
    if largest == 0:
        return 0.0, x
    norm = np.linalg.norm(x / largest)
    return largest * norm, x / largest / norm
