"""Weighted sum of losses."""

import math
from collections.abc import Callable, Sequence
from numbers import Real

from jaxtyping import Array, Float, PyTree

from ._batch import BatchLoss, reduce_batch


def weighted(
    terms: Sequence[tuple[float, Callable[..., Array]]],
) -> Callable[..., Array]:
    """Weighted sum of losses, itself a loss.

    Σᵢ wᵢ ℓᵢ(p, t). If one of the terms is a `BatchLoss`, so is the result: the other
    terms are averaged over the batch.

    Args:
        terms: Pairs `(weight, loss)`. Weights are finite numbers and are not
            normalised.

    Returns:
        Loss `(prediction, target=None) -> scalar`, or a `BatchLoss`.

    Raises:
        ValueError: If there are no terms, or a weight is not finite.
        TypeError: If a term is not a pair of a number and a function.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> both = loss.weighted([(1.0, loss.mse), (0.5, loss.mae)])
        >>> float(both(jnp.array([2.0, 2.0])))
        5.0
    """
    terms = tuple(_term(i, term) for i, term in enumerate(terms))
    if not terms:
        raise ValueError(
            "Expected at least one pair (weight, loss), got none. "
            "Pass for example [(1.0, mse), (0.1, mae)]."
        )

    def weighted_loss(
        prediction: PyTree[Array], target: PyTree[Array] | None = None
    ) -> Float[Array, ""]:
        return sum(weight * loss(prediction, target) for weight, loss in terms)

    def weighted_batch_loss(
        prediction_batch: PyTree[Array], target_batch: PyTree[Array] | None = None
    ) -> Float[Array, ""]:
        return sum(
            weight * reduce_batch(loss, prediction_batch, target_batch)
            for weight, loss in terms
        )

    if any(isinstance(loss, BatchLoss) for _, loss in terms):
        return BatchLoss(weighted_batch_loss)
    return weighted_loss


def _term(index: int, term: object) -> tuple[float, Callable[..., Array]]:
    if not isinstance(term, tuple | list) or len(term) != 2:
        raise TypeError(
            f"Expected term {index} to be a pair (weight, loss), got {term!r}. "
            "Pass for example [(1.0, mse), (0.1, mae)]."
        )
    weight, loss = term
    if isinstance(weight, bool) or not isinstance(weight, Real) or not callable(loss):
        raise TypeError(
            f"Expected term {index} to be a number and a function, got "
            f"{type(weight).__name__} and {type(loss).__name__}. "
            "The weight comes first."
        )
    if not math.isfinite(weight):
        raise ValueError(
            f"Expected a finite weight for term {index}, got {weight}. "
            "Leave a term out instead of giving it an infinite weight."
        )
    return float(weight), loss
