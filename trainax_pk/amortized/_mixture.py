"""Mixture of Gaussians as a head."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count
from trainax_pk.amortized._gaussian import calm, full_log_prob, full_sample, unpack
from trainax_pk.amortized._head import AbstractHead, make_network


class GaussianMixture(AbstractHead):
    """Σ_k w_k(f) N(μ_k(f), Σ_k(f)), full covariances: a mixture density network.

    Attributes:
        dim: d.
        num_features: Length of f.
        num_components: K.
        network: f ↦ (log w, and μ and factor of each component).

    Raises:
        ValueError: A count out of range.

    Source: Bishop 1994, Mixture Density Networks.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import GaussianMixture
        >>> head = GaussianMixture(2, 5, num_components=3, key=jax.random.key(0))
        >>> weights, means, factors = head.components(jnp.ones(5))
        >>> weights.shape, means.shape, factors.shape
        ((3,), (3, 2), (3, 2, 2))
    """

    dim: int = eqx.field(static=True)
    num_features: int = eqx.field(static=True)
    num_components: int = eqx.field(static=True)
    network: eqx.nn.MLP
    reparametrised: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        num_components: int,
        width: int = 64,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the network.

        Args:
            dim: d.
            num_features: Length of f.
            num_components: K.
            width: Width of the hidden layers.
            depth: Number of hidden layers.
            activation: Between them.
            key: Key of the weights.
        """
        self.dim, self.num_features = check_count("dim", dim), num_features
        self.num_components = check_count("num_components", num_components)
        each = 1 + dim * (dim + 3) // 2
        outputs = num_components * each
        network = make_network(num_features, outputs, width, depth, activation, key)
        self.network = calm(network, np.arange(outputs) % each > dim)

    def components(
        self, features: Float[Array, " f"]
    ) -> tuple[Float[Array, " K"], Float[Array, "K d"], Float[Array, "K d d"]]:
        """Logarithms of the weights, means, and factors P with Σ = (PᵀP)⁻¹."""
        raw = self.network(features).reshape(self.num_components, -1)
        means, factors = jax.vmap(lambda r: unpack(r, self.dim))(raw[:, 1:])
        return jax.nn.log_softmax(raw[:, 0]), means, factors

    def log_prob(
        self, z: Float[Array, " d"], features: Float[Array, " f"]
    ) -> Float[Array, ""]:
        """log Σ_k w_k N(z; μ_k, Σ_k)."""
        log_weights, means, factors = self.components(features)
        parts = jax.vmap(lambda m, p: full_log_prob(z, m, p))(means, factors)
        return jax.nn.logsumexp(log_weights + parts)

    def sample(
        self, key: PRNGKeyArray, features: Float[Array, " f"]
    ) -> Float[Array, " d"]:
        """A draw of a component drawn by its weight."""
        which_key, noise_key = jax.random.split(key)
        log_weights, means, factors = self.components(features)
        k = jax.random.categorical(which_key, log_weights)
        return full_sample(noise_key, means[k], factors[k])
