"""What a reconstruction is trained on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def reconstruction_loss(
    prediction: Float[Array, "B T ..."],
    target: Float[Array, "B T ..."] | None,
    *,
    mask: Bool[Array, "..."] | None = None,
    weights: Float[Array, "..."] | None = None,
    gradient_weight: float = 0.0,
    gradient_axes: tuple[int, ...] | None = None,
    prior: Callable[[Array], Array] | None = None,
    prior_weight: float = 0.0,
    target_prior_weight: float = 0.0,
) -> Float[Array, ""]:
    """Error of reconstructed states, of their differences, and of what the prior says.

    With e = x̂ − x and ⟨·⟩ the mean over the entries that count, weighted:

        L = ⟨e²⟩ + λ_g Σ_axes ⟨(D e)²⟩ + λ_p ⟨(x̂ − Φ(x̂))²⟩ + λ_t ⟨(x − Φ(x))²⟩.

    D takes differences of neighbours along an axis; a difference counts where both
    neighbours do, with the mean of their weights. The last two means are over all
    entries; they keep the prior one of states and not of the solver's iterates.

    Args:
        prediction: x̂, `(B, T, ...)`.
        target: x, of the same shape. What stands where the mask does not hold is never
            read.
        mask: Entries that count, of a shape that broadcasts to the prediction's; all by
            default.
        weights: w >= 0, of a shape that broadcasts to the prediction's, such as `(T, 1)`
            for a weight in time; ones by default.
        gradient_weight: λ_g.
        gradient_axes: Axes of D, of `(B, T, ...)`; by default time for `(B, T, N)` and
            space for `(B, T, H, W)`.
        prior: Φ, a function of one state; needed for the last two terms.
        prior_weight: λ_p.
        target_prior_weight: λ_t; where the target does not count, x̂ stands for it.

    Returns:
        Scalar. 0 where nothing counts.

    Raises:
        ValueError: No target, shapes that do not fit, a λ below 0, an axis that is
            none, a weight of a prior that is not given.

    Source: Fablet et al. 2021, doi:10.1029/2021MS002572.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import reconstruction_loss
        >>> x_hat = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> x = jnp.array([[[1.0], [1.0], [jnp.nan]]])
        >>> float(reconstruction_loss(x_hat, x, mask=~jnp.isnan(x)))
        2.0
    """
    factors = check_factors(gradient_weight, prior_weight, target_prior_weight)
    if any(factors[1:]) and prior is None:
        raise ValueError(
            "Expected a `prior` for prior_weight and target_prior_weight, got None. "
            "Pass the solver's: prior=solver.prior."
        )
    terms = reconstruction_terms(
        prediction,
        target,
        mask=mask,
        weights=weights,
        gradient_axes=gradient_axes if gradient_weight else (),
        prior=prior if any(factors[1:]) else None,
    )
    return weighted_terms(terms, factors)


def reconstruction_terms(
    prediction: Array,
    target: Array | None,
    *,
    mask: Array | None = None,
    weights: Array | None = None,
    gradient_axes: tuple[int, ...] | None = None,
    prior: Callable[[Array], Array] | None = None,
) -> Float[Array, "4"]:
    """The four means of `reconstruction_loss`, 0 for those that are not asked for."""
    if target is None:
        raise ValueError(
            "Expected a target to compare the reconstruction with, got None. Pass a "
            "batch with `target`, the true states."
        )
    shape = jnp.shape(prediction)
    if jnp.shape(target) != shape:
        raise ValueError(
            f"Expected a target of the prediction's shape {list(shape)}, got "
            f"{list(jnp.shape(target))}. Check axes of model and data."
        )
    counts = _broadcast("mask", True if mask is None else mask, shape) != 0
    w = _broadcast("weights", 1.0 if weights is None else weights, shape)
    w = jnp.where(counts, w.astype(prediction.dtype), 0)
    known = jnp.where(counts, target, jax.lax.stop_gradient(prediction))
    error = jnp.where(counts, prediction - known, 0)
    zero = jnp.zeros((), prediction.dtype)
    gradient = zero
    for axis in _axes(gradient_axes, len(shape)):
        pair = _neighbours(w, axis)
        both = jnp.where((pair[0] > 0) & (pair[1] > 0), (pair[0] + pair[1]) / 2, 0)
        gradient = gradient + _mean_square(jnp.diff(error, axis=axis), both)
    own = theirs = zero
    if prior is not None:
        own = jnp.mean(jnp.square(prediction - jax.vmap(prior)(prediction)))
        theirs = jnp.mean(jnp.square(known - jax.vmap(prior)(known)))
    return jnp.stack([_mean_square(error, w), gradient, own, theirs])


def check_factors(*factors: Any) -> tuple[float, ...]:
    """λ_g, λ_p, λ_t, each a number >= 0."""
    names = ("gradient_weight", "prior_weight", "target_prior_weight")
    for name, factor in zip(names, factors, strict=True):
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not is_number or not 0 <= factor < float("inf"):
            raise ValueError(
                f"Expected `{name}` to be a finite number >= 0, got {factor!r}. 0 "
                "leaves the term out."
            )
    return tuple(float(factor) for factor in factors)


def weighted_terms(terms: Array, factors: tuple[float, ...]) -> Float[Array, ""]:
    """L of the four means."""
    # Term by term: a term with factor 0 may be infinite.
    return sum((f * terms[i + 1] for i, f in enumerate(factors) if f), terms[0])


def _broadcast(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    try:
        return jnp.broadcast_to(value, shape)
    except ValueError as error:
        raise ValueError(
            f"Expected `{name}` to broadcast to the prediction's shape {list(shape)}, "
            f"got {list(jnp.shape(value))}. Give it axes of length 1 where it is the "
            "same."
        ) from error


def _axes(axes: tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    if axes is None:
        return (1,) if rank == 3 else tuple(range(2, rank))
    for axis in axes:
        if not isinstance(axis, int) or not 1 <= axis < rank:
            raise ValueError(
                f"Expected `gradient_axes` between 1 and {rank - 1}, the axes after the "
                f"batch's, got {axis!r}. 1 is time."
            )
    return axes


def _neighbours(x: Array, axis: int) -> tuple[Array, Array]:
    length = x.shape[axis]
    return tuple(
        jax.lax.slice_in_dim(x, start, length - 1 + start, axis=axis)
        for start in (0, 1)
    )


def _mean_square(error: Array, weights: Array) -> Float[Array, ""]:
    total = jnp.sum(weights)
    return jnp.sum(weights * jnp.square(error)) / jnp.where(total > 0, total, 1)
