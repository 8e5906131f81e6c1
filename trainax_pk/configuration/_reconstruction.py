"""Training of solvers that reconstruct states from observations."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._batch import Batch
from trainax_pk._tree import check_flag
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.solver._losses import (
    check_factors,
    reconstruction_terms,
    weighted_terms,
)
from trainax_pk.solver._training import check_target


class Reconstruction(AbstractConfiguration):
    """Error of a solver's states: `tx.solver.reconstruction_loss` on batches.

    L = ⟨e²⟩ + λ_g Σ_axes ⟨(D e)²⟩ + λ_p ⟨(x̂ − Φ(x̂))²⟩ + λ_t ⟨(x − Φ(x))²⟩, with
    x̂ = model(batch), e = x̂ − batch.target, Φ the model's prior. How the solver's steps
    are differentiated, and at what memory, says its `solver_adjoint`.

    Attributes:
        weights: Of the entries, of a shape that broadcasts to the target's, or None.
        gradient_weight: λ_g.
        gradient_axes: Axes of the differences, or None for time in 1D and space in 2D.
        prior_weight: λ_p.
        target_prior_weight: λ_t.
        skip_missing: Entries whose target is NaN do not count. Without it they make the
            loss NaN, which the step reports.

    Raises:
        ValueError: When built: a λ below 0. When called: no batch, or one without
            target; shapes that do not fit; a term of the prior for a model without one.

    Source: Fablet et al. 2021, doi:10.1029/2021MS002572.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> configuration = tx.configuration.Reconstruction(gradient_weight=0.5)
        >>> y = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> batch = tx.Batch1D(y, jnp.ones((1, 3, 1)), target=0 * y)
        >>> loss, aux = configuration(lambda batch: batch.observed(), batch)
        >>> float(loss), aux.parts[:2].tolist()  # 7 + 0.5 · (1² + 2²) / 2
        (8.25, [7.0, 2.5])
    """

    weights: Float[Array, "..."] | None
    gradient_weight: float = eqx.field(static=True)
    gradient_axes: tuple[int, ...] | None = eqx.field(static=True)
    prior_weight: float = eqx.field(static=True)
    target_prior_weight: float = eqx.field(static=True)
    skip_missing: bool = eqx.field(static=True)

    def __init__(
        self,
        *,
        weights: Any = None,
        gradient_weight: float = 0.0,
        gradient_axes: tuple[int, ...] | None = None,
        prior_weight: float = 0.0,
        target_prior_weight: float = 0.0,
        skip_missing: bool = False,
    ) -> None:
        self.weights = None if weights is None else jnp.asarray(weights)
        self.gradient_weight, self.prior_weight, self.target_prior_weight = (
            check_factors(gradient_weight, prior_weight, target_prior_weight)
        )
        self.gradient_axes = gradient_axes
        self.skip_missing = check_flag("skip_missing", skip_missing)

    @property
    def num_times(self) -> int:
        """1: a sample is a batch's own window, not one cut out of a trajectory."""
        return 1

    def __call__(
        self, model: Any, batch: Batch, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch; `Aux.parts` are the four means, unweighted."""
        check_target(batch)
        target = batch.target
        prediction = model(batch).astype(target.dtype)
        terms = reconstruction_terms(
            prediction,
            target,
            mask=~jnp.isnan(target) if self.skip_missing else None,
            weights=self.weights,
            gradient_axes=self.gradient_axes if self.gradient_weight else (),
            prior=self._prior(model),
        )
        factors = (self.gradient_weight, self.prior_weight, self.target_prior_weight)
        return weighted_terms(terms, factors), Aux(parts=terms)

    def _prior(self, model: Any) -> Any:
        if not (self.prior_weight or self.target_prior_weight):
            return None
        if not hasattr(model, "prior"):
            raise ValueError(
                f"Expected a model with a field or property `prior` for prior_weight "
                f"and target_prior_weight, got {type(model).__name__}. Leave both 0, or "
                "give it one (compute_dtype hides it)."
            )
        return model.prior
