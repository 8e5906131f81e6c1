"""Noise on the states that a configuration starts from."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import is_concrete
from trainax_pk._types import Window
from trainax_pk.configuration._base import (
    AbstractConfiguration,
    Aux,
    check_configuration,
)
from trainax_pk.configuration._chain import as_window


class InputNoise(AbstractConfiguration):
    """Noise injection: the window's initial state becomes r_0 + σ·ξ, ξ ~ N(0, 1).

    Teaches a model to return from states that its own errors lead to
    (Sanchez-Gonzalez et al. 2020, arXiv:2002.09405). Targets stay clean; a diverted
    chain's reference starts from the noisy state.

    Attributes:
        configuration: The configuration that is run on the noisy windows.
        std: σ in the units of the state: a scalar, or a PyTree like the state whose
            leaves broadcast against it. Leaves of integers get no noise.

    Raises:
        ValueError: A negative σ, no configuration, or, when called, no key, or a σ that
            does not broadcast against the state.

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
        check_configuration(self.configuration)
        for leaf in jax.tree.leaves(self.std):
            if is_concrete(leaf) and not _is_deviation(leaf):
                raise ValueError(
                    f"Expected `std` to be finite and >= 0, got {leaf!r}. Pass a "
                    "standard deviation in the units of the state."
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
        state = jax.tree.map(
            _with_noise,
            window.state,
            _one_for_each(self.std, window.state),
            _keys_like(noise_key, window.state),
        )
        window = Window(state, window.sample, window.time)
        return self.configuration(model, window, key=key)


def _is_deviation(x: Any) -> bool:
    x = np.asarray(x)
    return x.dtype.kind in "iuf" and bool(np.all(np.isfinite(x) & (x >= 0)))


def _one_for_each(std: PyTree[Any], state: PyTree[Array]) -> PyTree[Any]:
    if jax.tree.structure(std) == jax.tree.structure(state):
        return std
    if jax.tree.structure(std) != jax.tree.structure(0):
        raise ValueError(
            f"Expected `std` to be one array or a PyTree like the state "
            f"({jax.tree.structure(state)}), got {jax.tree.structure(std)}. Pass one "
            "standard deviation for each leaf."
        )
    return jax.tree.map(lambda _: std, state)


def _keys_like(key: PRNGKeyArray, state: PyTree[Array]) -> PyTree[PRNGKeyArray]:
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(list(jax.random.split(key, len(leaves))))


def _with_noise(x: Array, std: Any, key: PRNGKeyArray) -> Array:
    if not eqx.is_inexact_array(x):
        return x
    try:
        std = jnp.broadcast_to(std, x.shape[2:])
    except ValueError as error:
        raise ValueError(
            f"Expected `std` to broadcast against a state {list(x.shape[2:])}, got "
            f"{list(jnp.shape(std))}. Pass a scalar, or shape (channels, 1, ...)."
        ) from error
    noise = jax.random.normal(key, x[:, 0].shape, x.dtype)
    return x.at[:, 0].add(std[None].astype(x.dtype) * noise)
