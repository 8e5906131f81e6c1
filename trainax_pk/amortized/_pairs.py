"""Pairs of parameters and observations."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from trainax_pk._batch import is_batch
from trainax_pk._tree import is_concrete


class Pairs(eqx.Module):
    """Simulated pairs (θ, x), checked: what densities are trained on.

    `tx.data.Samples(pairs)` hands them to a trainer.

    Attributes:
        theta: Parameters, leaves `(N, ...)`.
        x: Observations, `(N, ...)`. What stands where the mask does not hold is never
            read: NaN is welcome there.
        mask: Which entries were observed, of the shape of x; None for all.

    Raises:
        ValueError: θ and x of different lengths, θ that is not finite or outside of the
            prior's support, x that is not finite where it counts as observed, a mask of
            another shape. Messages hold the first index.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> prior = tx.data.BoxUniform([-1.0, -1.0], [1.0, 1.0])
        >>> theta = jax.vmap(prior.sample)(jax.random.split(jax.random.key(0), 6))
        >>> pairs = tx.amortized.Pairs(theta, theta + 1.0, prior=prior)
        >>> len(tx.data.Samples(pairs))
        6
    """

    theta: PyTree[Array]
    x: Float[Array, "N ..."]
    mask: Bool[Array, "N ..."] | None
    rows_are_samples: ClassVar[bool] = True

    def __init__(
        self, theta: Any, x: Any, mask: Any = None, *, prior: Any = None
    ) -> None:
        """Checks and keeps the arrays.

        Args:
            theta: Leaves `(N, ...)`.
            x: `(N, ...)`.
            mask: Of the shape of x, or None.
            prior: With `bounds()`; θ must lie within. None does not look.
        """
        # Host arrays stay on the host: where data live is the trainer's choice.
        self.theta = jax.tree.map(_floating("theta"), theta)
        self.x = _floating("x")(x)
        self.mask = None if mask is None else _checked_mask(mask, self.x)
        _check_rows(self.theta, self.x, self.mask)
        leaves = (*jax.tree.leaves(self.theta), self.x)
        if all(is_concrete(leaf) for leaf in leaves):
            _check_values(self.theta, self.x, self.mask, prior)


def as_pairs(batch: Any) -> tuple[PyTree[Array], Array, Array | None]:
    """Parameters, observations and mask of a batch.

    Args:
        batch: `Pairs`; a tuple (theta, x) or (theta, x, mask), as simulations are; or a
            `Batch1D` or `Batch2D`, whose target is theta.

    Returns:
        theta, leaves `(B, ...)`; x, `(B, ...)`, 0 in the gaps; the mask or None.

    Raises:
        ValueError: Anything else; a batch without target.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> y = jnp.ones((4, 3, 2))
        >>> theta, x, mask = tx.amortized.as_pairs(tx.Batch1D(y, y, target=2 * y))
        >>> theta.shape, mask.shape
        ((4, 3, 2), (4, 3, 2))
    """
    if isinstance(batch, Pairs):
        return batch.theta, observed(batch.x, batch.mask), batch.mask
    if is_batch(batch) and batch.target is not None:
        return batch.target, batch.observed(), batch.mask
    if isinstance(batch, tuple) and len(batch) in (2, 3):
        theta, x, mask = (*batch, None)[:3]
        _check_rows(theta, x, mask)
        return theta, observed(x, mask), mask
    raise ValueError(
        "Expected pairs of parameters and observations, got "
        f"{type(batch).__name__}{' without target' if is_batch(batch) else ''}. Pass "
        "tx.amortized.Pairs(theta, x), a tuple (theta, x), or tx.Batch1D(input, mask, "
        "target) with theta as target."
    )


def _check_rows(theta: Any, x: Any, mask: Any) -> None:
    """As many rows of everything, at least one, or a ValueError."""
    lengths = {jnp.shape(leaf)[:1] for leaf in (*jax.tree.leaves(theta), x)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"Expected theta and x of one length, got {sorted(lengths)}. Row i of "
            "theta is what row i of x was simulated from."
        )
    if lengths == {(0,)}:
        raise ValueError("Expected at least one pair, got none. Simulate some.")
    if mask is not None and jnp.shape(mask) != jnp.shape(x):
        raise ValueError(
            f"Expected a mask of x's shape {jnp.shape(x)}, got {jnp.shape(mask)}. "
            "Broadcast it: jnp.broadcast_to(mask, x.shape)."
        )


def observed(x: Any, mask: Any) -> Array:
    """x with zeros in the gaps."""
    x = jnp.asarray(x)
    if mask is None:
        return x
    return jnp.where(jnp.asarray(mask, bool), x, jnp.zeros((), x.dtype))


def as_observation(x: Any) -> Array:
    """One observation as an array of floating numbers: lists and integers are welcome."""
    x = jnp.asarray(x)
    is_inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return x if is_inexact else x.astype(jnp.result_type(float))


def _floating(name: str) -> Any:
    def check(value: Any) -> Any:
        value = value if hasattr(value, "dtype") else np.asarray(value, float)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"Expected `{name}` to be floating, got {value.dtype}. Convert it with "
                "jnp.asarray(x, float)."
            )
        return value

    return check


def _checked_mask(mask: Any, x: Any) -> Any:
    if getattr(mask, "shape", None) != x.shape:
        raise ValueError(
            f"Expected a mask of x's shape {x.shape}, got "
            f"{getattr(mask, 'shape', type(mask).__name__)}. Broadcast it: "
            "jnp.broadcast_to(mask, x.shape)."
        )
    return mask.astype(bool)


def check_observations(x: Any, mask: Any) -> None:
    """Finite where observed, or a ValueError; of arrays that are known."""
    if not (is_concrete(x) and is_concrete(mask)):
        return
    bad = ~np.isfinite(np.asarray(x))
    if mask is not None:
        bad &= np.asarray(mask, bool)
    if bad.any():
        raise ValueError(
            f"Expected finite observations, got {np.asarray(x)[bad][0]} at index "
            f"{_first(bad)} of x ({bad.sum()} such entries). Pass a mask that does not "
            "hold there, or leave these simulations out."
        )


def _check_values(theta: Any, x: Any, mask: Any, prior: Any) -> None:
    check_observations(x, mask)
    for leaf in jax.tree.leaves(theta):
        wrong = ~np.isfinite(np.asarray(leaf))
        if wrong.any():
            raise ValueError(
                f"Expected finite parameters, got {np.asarray(leaf)[wrong][0]} at index "
                f"{_first(wrong)} of theta. Leave these simulations out."
            )
    if prior is None:
        return
    low, high = (jax.tree.leaves(bound) for bound in prior.bounds())
    for leaf, least, most in zip(jax.tree.leaves(theta), low, high, strict=True):
        values = np.asarray(leaf)
        outside = (values < np.asarray(least)[None]) | (values > np.asarray(most)[None])
        if outside.any():
            raise ValueError(
                f"Expected parameters within the prior's support, got "
                f"{values[outside][0]} at index {_first(outside)} of theta "
                f"({outside.sum()} such entries). Pass the prior that they were drawn "
                "from."
            )


def _first(where: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])
