"""The variational cost: how far a state is from the observations and from the prior."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trainax_pk._tree import check_flag
from trainax_pk.solver._prior import check_prior


class Weight(eqx.Module):
    """A number that training leaves alone, or a positive one that it learns.

    Attributes:
        fixed: The number, or None.
        logarithm: What is learned, or None.

    Raises:
        ValueError: A negative or infinite number; 0 where it is to be learned.

    Example:
        >>> from trainax_pk.solver import Weight
        >>> round(float(Weight(0.5, learned=True).value()), 6)
        0.5
    """

    fixed: float | None = eqx.field(static=True)
    logarithm: Float[Array, ""] | None

    def __init__(
        self, value: float, *, learned: bool = False, name: str = "weight"
    ) -> None:
        check_flag("learned", learned)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"Expected `{name}` to be a finite number >= 0, got {value!r}. Pass a "
                "Python float."
            )
        if learned and value == 0:
            raise ValueError(
                f"Expected `{name}` > 0 where it is learned, got 0: it is kept positive "
                "by its logarithm. Start from a small number."
            )
        self.fixed = None if learned else float(value)
        self.logarithm = jnp.log(jnp.asarray(float(value))) if learned else None

    def value(self) -> Any:
        """The number: a Python float, or a positive array."""
        return self.fixed if self.logarithm is None else jnp.exp(self.logarithm)


class VariationalCost(eqx.Module):
    """U(x) = w_o ‖m ⊙ (H(x) − y)‖² + w_p ‖x − Φ(x)‖² of one window.

    x: state `(T, *space)`; y: observations and m: mask, of the shape that H returns;
    sums over all entries, so that with w_o = 1/σ² and a linear-Gaussian prior U/2 is the
    negative log posterior up to a constant.

    What stands in y where m does not hold is never read.

    Attributes:
        prior: Φ, any function of one state.
        observation: H, any function of one state; None is the identity.
        observation_weight: w_o.
        prior_weight: w_p.

    Raises:
        ValueError: A prior or operator that is not callable, negative weights; when
            called, an H(x) of another shape than y, a Φ(x) of another shape than x.

    Source: Fablet et al. 2021, doi:10.1029/2021MS002572.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import VariationalCost
        >>> cost = VariationalCost(lambda x: x / 2, prior_weight=4.0)
        >>> x, y = jnp.array([[2.0], [4.0]]), jnp.array([[1.0], [jnp.nan]])
        >>> float(cost(x, y, ~jnp.isnan(y)))  # (2 - 1)² + 4 (1² + 2²)
        21.0
    """

    prior: Callable[[Array], Array]
    observation: Callable[[Array], Array] | None
    observation_weight: Weight
    prior_weight: Weight

    def __init__(
        self,
        prior: Callable[[Array], Array],
        observation: Callable[[Array], Array] | None = None,
        *,
        observation_weight: float = 1.0,
        prior_weight: float = 1.0,
        learn_weights: bool = False,
    ) -> None:
        """Checks and keeps.

        Args:
            prior: Φ.
            observation: H.
            observation_weight: w_o >= 0.
            prior_weight: w_p >= 0.
            learn_weights: Train the logarithms of both weights.
        """
        self.prior = check_prior(prior)
        if observation is not None and not callable(observation):
            raise ValueError(
                f"Expected `observation` to be a function x -> H(x) of one state or "
                f"None, got {observation!r}. None observes the state itself."
            )
        self.observation = observation
        self.observation_weight = Weight(
            observation_weight, learned=learn_weights, name="observation_weight"
        )
        self.prior_weight = Weight(
            prior_weight, learned=learn_weights, name="prior_weight"
        )

    def __call__(
        self,
        x: Float[Array, "T ..."],
        y: Float[Array, "..."],
        mask: Bool[Array, "..."],
    ) -> Float[Array, ""]:
        """U(x)."""
        observed = x if self.observation is None else self.observation(x)
        projected = self.prior(x)
        for name, got, like in (("H(x)", observed, y), ("Φ(x)", projected, x)):
            if jnp.shape(got) != jnp.shape(like):
                raise ValueError(
                    f"Expected {name} to have the shape {list(jnp.shape(like))}, got "
                    f"{list(jnp.shape(got))}. Where states and observations differ in "
                    "shape, give the batch an `initial` state and the cost an "
                    "`observation` operator."
                )
        # Both selections before the difference: no NaN of a gap enters a product.
        y = jnp.where(mask, y, jnp.zeros((), y.dtype))
        misfit = jnp.where(mask, observed - y, jnp.zeros((), observed.dtype))
        return self.observation_weight.value() * _squares(
            misfit
        ) + self.prior_weight.value() * _squares(x - projected)

    def gradient(
        self,
        x: Float[Array, "T ..."],
        y: Float[Array, "..."],
        mask: Bool[Array, "..."],
    ) -> Float[Array, "T ..."]:
        """∇U(x), through H and Φ."""
        return jax.grad(self)(x, y, mask)


def _squares(x: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x))
