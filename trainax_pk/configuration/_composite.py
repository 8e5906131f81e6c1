"""Weighted sums of configurations."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import check_weights
from trainax_pk._types import Window
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._chain import weighted_sum


class Composite(AbstractConfiguration):
    """Σ_i w_i · L_i of configurations on the same batch.

    A stateful model's layers take their new state from the first member. Compute is
    the sum of the members'.

    Attributes:
        configurations: The members.
        weights: One real weight for each.

    Raises:
        ValueError: No member, a member that is no configuration, or another number of
            weights than of members.

    Source: trainax (github.com/Ceyron/trainax), `Composite`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> one = tx.configuration.Supervised(1)
        >>> two = tx.configuration.Supervised(2)
        >>> both = tx.configuration.Composite([one, two], [1.0, 0.5])
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> both(lambda u: 3 * u, window)[0]  # 1 + 0.5 · 26
        Array(14., dtype=float32)
    """

    configurations: tuple[AbstractConfiguration, ...]
    weights: Float[Array, " n"]

    def __init__(
        self,
        configurations: Sequence[AbstractConfiguration],
        weights: Sequence[float] | Float[Array, " n"],
    ) -> None:
        self.configurations = tuple(configurations)
        if not self.configurations:
            raise ValueError(
                "Expected at least one configuration, got none. Pass a list of them."
            )
        for i, member in enumerate(self.configurations):
            if not isinstance(member, AbstractConfiguration):
                raise ValueError(
                    f"Expected configurations[{i}] to be a configuration, got "
                    f"{member!r}. Pass instances of tx.configuration classes."
                )
        if not hasattr(weights, "shape"):
            weights = jnp.asarray(list(weights), dtype=jnp.result_type(float))
        self.weights = check_weights(
            "weights", weights, len(self.configurations), "configurations"
        )

    @property
    def num_times(self) -> int:
        """The longest of the members'."""
        return max(member.num_times for member in self.configurations)

    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Weighted sum; `Aux.parts` holds the members' losses, `(n,)`."""
        count = len(self.configurations)
        keys = [None] * count if key is None else jax.random.split(key, count)
        results = [
            member(model, batch, key=k)
            for member, k in zip(self.configurations, keys, strict=True)
        ]
        parts = jnp.stack([loss for loss, _ in results])
        state = results[0][1].model_state
        return weighted_sum(self.weights, parts), Aux(parts=parts, model_state=state)
