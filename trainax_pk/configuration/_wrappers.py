"""Configurations that change what another one starts from, or how far it goes."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._rollout import rollout
from trainax_pk._stepper import Stepper
from trainax_pk._tree import check_count
from trainax_pk._types import Window
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._chain import as_window, initial


class InputNoise(AbstractConfiguration):
    """Noise injection: the window's initial state becomes r_0 + σ·ξ, ξ ~ N(0, 1).

    Teaches a model to return from states that its own errors lead to
    (Sanchez-Gonzalez et al. 2020, arXiv:2002.09405). Targets stay clean; a diverted
    chain's reference starts from the noisy state.

    Attributes:
        configuration: The configuration that is run on the noisy windows.
        std: σ in the units of the state: a scalar, or a PyTree like the state whose
            leaves broadcast against it.

    Raises:
        ValueError: A negative σ, no configuration, or, when called, no key.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> noisy = tx.configuration.InputNoise(tx.configuration.Supervised(1), 0.0)
        >>> window = jnp.array([[[1.0], [2.0]]])
        >>> noisy(lambda u: 3 * u, window, key=jax.random.key(0))[0]
        Array(1., dtype=float32)
    """

    configuration: AbstractConfiguration
    std: PyTree[Any]

    def __check_init__(self) -> None:
        _check_inner(self.configuration)
        for leaf in jax.tree.leaves(self.std):
            if not isinstance(leaf, jax.core.Tracer) and bool(jnp.any(leaf < 0)):
                raise ValueError(
                    f"Expected `std` to be >= 0, got {leaf}. Pass a standard deviation."
                )

    @property
    def num_times(self) -> int:
        """As the inner configuration's."""
        return self.configuration.num_times

    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of the inner configuration on windows with a noisy initial state."""
        if key is None:
            raise ValueError("Expected a key for InputNoise, got None. Pass `key=`.")
        window = as_window(batch, self.num_times, "InputNoise")
        noise_key, key = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(window.state)
        stds = jax.tree.leaves(self.std)
        stds = stds * len(leaves) if len(stds) == 1 else stds
        keys = jax.random.split(noise_key, len(leaves))
        noisy = [
            x.at[:, 0].add(
                jnp.asarray(s, x.dtype) * jax.random.normal(k, x[:, 0].shape, x.dtype)
            )
            for x, s, k in zip(leaves, stds, keys, strict=True)
        ]
        window = Window(treedef.unflatten(noisy), window.sample, window.time)
        return self.configuration(model, window, key=key)


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
        ValueError: P below 1, no configuration; when called, windows that are too short.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> push = tx.configuration.Pushforward(tx.configuration.Supervised(1), 1)
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> push(lambda u: 3 * u, window)[0]  # (3·3 - 4)²
        Array(25., dtype=float32)
    """

    configuration: AbstractConfiguration
    num_steps: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        _check_inner(self.configuration)
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


class Curriculum(AbstractConfiguration):
    """Rollout-length curriculum: the first `schedule(step)` times count.

    One program for all lengths: steps past the current length are skipped at run time,
    not recompiled away. Loss and gradient equal those of a configuration built with the
    shorter length. `make_train_step` supplies the step; called directly, all times
    count. Inside `vmap` over the step, skipping becomes masking.

    Attributes:
        configuration: One with a `horizon` (Supervised, DivertedChain, Residuum), built
            with the greatest length.
        schedule: `step -> number of times`, traced; clipped to 1 … num_rollout_steps.
            The schedules of optax serve.

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
        _check_inner(self.configuration)
        if not hasattr(self.configuration, "horizon"):
            raise ValueError(
                "Expected a configuration with a horizon (Supervised, DivertedChain, "
                f"Residuum), got {type(self.configuration).__name__}. Put the curriculum "
                "around that one, inside other wrappers."
            )
        if not callable(self.schedule):
            raise ValueError(
                f"Expected `schedule` to be callable, got {self.schedule!r}. Pass a "
                "function from step to number of times."
            )

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
        horizon = jnp.clip(jnp.asarray(self.schedule(step)), shortest, longest)
        return eqx.tree_at(
            lambda c: c.horizon,
            self.configuration,
            horizon.astype(jnp.int32),
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


def _check_inner(configuration: Any) -> None:
    if not isinstance(configuration, AbstractConfiguration):
        raise ValueError(
            f"Expected `configuration` to be a configuration, got {configuration!r}. "
            "Pass an instance of a tx.configuration class."
        )
