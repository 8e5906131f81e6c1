"""Losses of densities and ensembles."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def gaussian_nll(
    prediction: tuple[PyTree[Array], PyTree[Array]], target: PyTree[Array]
) -> Float[Array, ""]:
    """Mean of ½ ((y − μ) / σ)² + log σ + ½ log 2π: negative log-likelihood per entry.

    Args:
        prediction: μ and σ > 0, each like the target.
        target: y.

    Returns:
        Scalar, in nats per entry.

    Raises:
        ValueError: Leaves of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> round(float(tx.loss.gaussian_nll((jnp.zeros(3), jnp.ones(3)), jnp.ones(3))), 4)
        1.4189
    """
    mean, std = prediction
    check_like("gaussian_nll", mean, target)
    check_like("gaussian_nll", std, target)

    def entry(m: Array, s: Array, y: Array) -> Array:
        return 0.5 * ((y - m) / s) ** 2 + jnp.log(s) + 0.5 * math.log(2 * math.pi)

    return _mean(jax.tree.map(entry, mean, std, target))


def kl_gaussian(
    prediction: tuple[PyTree[Array], PyTree[Array]],
    target: tuple[PyTree[Array], PyTree[Array]] | None = None,
) -> Float[Array, ""]:
    """KL(N(μ, σ²) ‖ N(m, s²)) of independent entries, summed over them.

    Args:
        prediction: μ and σ > 0.
        target: m and s > 0, likewise; None for the standard normal.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: Leaves of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> float(tx.loss.kl_gaussian((jnp.ones(4), jnp.ones(4))))
        2.0
    """
    mean, std = prediction
    if target is None:
        target = jax.tree.map(jnp.zeros_like, mean), jax.tree.map(jnp.ones_like, std)
    check_like("kl_gaussian", mean, target[0])
    check_like("kl_gaussian", std, target[1])

    def entry(m: Array, s: Array, m0: Array, s0: Array) -> Array:
        ratio = s / s0
        return jnp.sum(0.5 * (ratio**2 + ((m - m0) / s0) ** 2 - 1) - jnp.log(ratio))

    return sum(jax.tree.leaves(jax.tree.map(entry, mean, std, *target)))


def crps_ensemble(prediction: PyTree[Array], target: PyTree[Array]) -> Float[Array, ""]:
    """Continuous ranked probability score of an ensemble, the mean over entries.

    (1/M) Σ_i |x_i − y| − 1 / (2 M (M − 1)) Σ_ij |x_i − x_j|: the fair form, whose
    expectation does not depend on the number of members, so that few of them suffice for
    training. It is least when members are draws of the distribution of y, and costs a sort
    along the members, O(M log M). With one member it is the mean absolute error.

    Args:
        prediction: Members, leaves `(M, ...)`.
        target: y, leaves `(...)`.

    Returns:
        Scalar, in units of y.

    Raises:
        ValueError: Leaves of other shapes.

    Source: Ferro 2014, doi:10.1002/qj.2270.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> float(tx.loss.crps_ensemble(jnp.array([[0.0], [2.0]]), jnp.array([1.0])))
        0.0
    """
    check_like("crps_ensemble", prediction, target, members=True)

    def entry(x: Array, y: Array) -> Array:
        count = x.shape[0]
        error = jnp.mean(jnp.abs(x - y[None]), axis=0)
        if count == 1:
            return error
        # Of all pairs the k-th smallest (from 0) is the larger one k times and the smaller
        # one M − 1 − k times: Σ_{i<j} |x_i − x_j| = Σ_k (2k − M + 1) x_(k).
        rank = 2.0 * jnp.arange(count, dtype=x.dtype) - count + 1
        spread = jnp.tensordot(rank, jnp.sort(x, axis=0), axes=1)
        return error - spread / (count * (count - 1))

    return _mean(jax.tree.map(entry, prediction, target))


def check_like(who: str, x: Any, y: Any, *, members: bool = False) -> None:
    """Leaves of the same shapes, with an axis of members or without."""
    skip = 1 if members else 0
    shapes = [jnp.shape(leaf)[skip:] for leaf in jax.tree.leaves(x)]
    wanted = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
    ranks = [jnp.ndim(leaf) - skip for leaf in jax.tree.leaves(x)]
    if shapes != wanted or ranks != [len(shape) for shape in wanted]:
        raise ValueError(
            f"Expected {who} to compare leaves of the same shapes"
            f"{' after the axis of members' if members else ''}, got {shapes} and "
            f"{wanted}. Pass one sample, both alike."
        )


def _mean(tree: PyTree[Array]) -> Float[Array, ""]:
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(x) for x in leaves) / sum(x.size for x in leaves)
