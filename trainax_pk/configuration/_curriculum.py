"""Rollouts that grow longer during training, in one program."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._types import Window
from trainax_pk.configuration._base import (
    AbstractConfiguration,
    Aux,
    check_configuration,
)
from trainax_pk.configuration._chain import check_callable


class Curriculum(AbstractConfiguration):
    """Rollout-length curriculum: the first `schedule(step)` times count.

    One program for all lengths: steps past the current length are skipped at run time,
    not recompiled away. Loss and gradient equal those of a configuration built with the
    shorter length. `make_train_step` supplies the step; called directly, all times
    count. Inside `vmap` over the step, skipping becomes masking.

    Attributes:
        configuration: One with a `horizon` (Supervised, DivertedChain, Residuum), built
            with the greatest length.
        schedule: `step -> number of times`, traced; clipped to 1 … num_rollout_steps,
            for a diverted chain from its branch's length on. The schedules of optax
            serve. Where it is NaN, so is the loss.

    Raises:
        ValueError: A configuration without a horizon, a schedule that is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> grow = tx.configuration.Curriculum(
        ...     tx.configuration.Supervised(2), lambda step: 1 + step // 100
        ... )
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> early = tx.configuration.at_step(grow, jnp.array(0))
        >>> early(lambda u: 3 * u, window)[0]
        Array(1., dtype=float32)
    """

    configuration: AbstractConfiguration
    schedule: Callable[[Array], Array]

    def __check_init__(self) -> None:
        check_configuration(self.configuration)
        if not hasattr(self.configuration, "horizon"):
            raise ValueError(
                "Expected a configuration with a horizon (Supervised, DivertedChain, "
                f"Residuum), got {type(self.configuration).__name__}. Put the "
                "curriculum around that one, inside other wrappers."
            )
        check_callable("schedule", self.schedule)

    @property
    def num_times(self) -> int:
        """As the inner configuration's: the greatest length."""
        return self.configuration.num_times

    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss at full length."""
        return self.configuration(model, batch, key=key)

    def at(self, step: Array) -> AbstractConfiguration:
        """The inner configuration with the horizon of a training step."""
        longest = self.configuration.num_rollout_steps
        shortest = getattr(self.configuration, "num_branch_steps", 1)
        wanted = jnp.asarray(self.schedule(step))
        horizon = jnp.clip(wanted, shortest, longest).astype(jnp.int32)
        weights = self.configuration.time_level_weights
        if jnp.issubdtype(wanted.dtype, jnp.floating):
            # No integer says NaN: it would be taken for a length.
            weights = jnp.where(jnp.isnan(wanted), jnp.nan, weights)
        return eqx.tree_at(
            lambda c: (c.horizon, c.time_level_weights),
            self.configuration,
            (horizon, weights),
            is_leaf=lambda x: x is None,
        )


def at_step(configuration: AbstractConfiguration, step: Array) -> AbstractConfiguration:
    """A configuration as it stands at a training step: curricula resolved.

    Args:
        configuration: Any configuration; curricula may stand anywhere inside it.
        step: Number of updates done, traced.

    Returns:
        The configuration with every `Curriculum` replaced by its inner one.

    Example:
        >>> import trainax_pk as tx
        >>> tx.configuration.at_step(tx.configuration.Supervised(3), 0).num_times
        4
    """
    return jax.tree.map(
        lambda c: c.at(step) if isinstance(c, Curriculum) else c,
        configuration,
        is_leaf=lambda c: isinstance(c, Curriculum),
    )
