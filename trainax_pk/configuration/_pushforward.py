"""States that the model itself arrives at, as initial states."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._rollout import rollout
from trainax_pk._stepper import Stepper
from trainax_pk._tree import as_int, check_count
from trainax_pk._types import Window
from trainax_pk.configuration._base import (
    AbstractConfiguration,
    Aux,
    check_configuration,
)
from trainax_pk.configuration._chain import as_window, initial


class Pushforward(AbstractConfiguration):
    """Pushforward trick: the model's own states, without gradient, as initial states.

    The model is first rolled out P steps under a stopped gradient; the inner
    configuration then runs on the window from time P on, starting from where the model
    arrived (Brandstetter, Worrall & Welling 2022, arXiv:2202.03376). Compute is P more
    forward steps; no memory for them.

    Attributes:
        configuration: The configuration that is run after the warm-up.
        num_steps: P, >= 1; a multiple of the model's bundle.

    Raises:
        ValueError: P below 1, no configuration; when called, windows that are too
            short.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> push = tx.configuration.Pushforward(tx.configuration.Supervised(1), 1)
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> push(lambda u: 3 * u, window)[0]  # (3·3 - 4)²
        Array(25., dtype=float32)
    """

    configuration: AbstractConfiguration
    num_steps: int = eqx.field(static=True, converter=as_int)

    def __check_init__(self) -> None:
        check_configuration(self.configuration)
        check_count("num_steps", self.num_steps)

    @property
    def num_times(self) -> int:
        """The inner configuration's and P more."""
        return self.configuration.num_times + self.num_steps

    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of the inner configuration, started where the model's rollout ends."""
        window = as_window(batch, self.num_times, "Pushforward")
        push_key, key = (None, None) if key is None else jax.random.split(key)
        frozen = jax.lax.stop_gradient(eqx.filter(model, eqx.is_inexact_array))
        frozen = eqx.combine(frozen, model)
        if isinstance(frozen, Stepper) and frozen.state is not None:
            # Running statistics are those of the steps that are trained on.
            frozen = eqx.nn.inference_mode(frozen)
        u0 = initial(window)
        batch_size = window.batch_size
        keys = None if push_key is None else jax.random.split(push_key, batch_size)

        def last(u: PyTree, sample: PyTree, time: PyTree, k: Any) -> PyTree:
            states = rollout(frozen, u, self.num_steps, sample=sample, time=time, key=k)
            return jax.tree.map(lambda x: x[-1], states)

        pushed = jax.vmap(last)(u0, window.sample, window.time, keys)
        pushed = jax.lax.stop_gradient(pushed)
        state = jax.tree.map(
            lambda x, p: x[:, self.num_steps :].at[:, 0].set(p), window.state, pushed
        )
        time = jax.tree.map(lambda x: x[:, self.num_steps :], window.time)
        return self.configuration(model, Window(state, window.sample, time), key=key)
