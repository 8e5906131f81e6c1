"""Gaussian heads: parameters of a normal density as functions of features."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count
from trainax_pk.amortized._head import AbstractHead, make_network, positive

_LOG_2PI = math.log(2 * math.pi)


class DiagonalGaussian(AbstractHead):
    """N(μ(f), diag σ²(f)); independent entries.

    Attributes:
        dim: d.
        num_features: Length of f.
        network: f ↦ (μ, raw σ).

    Raises:
        ValueError: A count out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import DiagonalGaussian
        >>> head = DiagonalGaussian(2, 5, key=jax.random.key(0))
        >>> head.log_prob(jnp.zeros(2), jnp.ones(5)).shape
        ()
    """

    dim: int = eqx.field(static=True)
    num_features: int = eqx.field(static=True)
    network: eqx.nn.MLP

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        width: int = 64,
        depth: int = 1,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the network.

        Args:
            dim: d.
            num_features: Length of f.
            width: Width of the hidden layers.
            depth: Number of hidden layers; 0 makes parameters linear in f.
            activation: Between them.
            key: Key of the weights.
        """
        self.dim, self.num_features = check_count("dim", dim), num_features
        self.network = make_network(
            num_features, 2 * dim, width, depth, activation, key
        )

    def mean_and_std(
        self, features: Float[Array, " f"]
    ) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """μ and σ."""
        mean, raw = jnp.split(self.network(features), 2)
        return mean, positive(raw)

    def mean_and_covariance(
        self, features: Float[Array, " f"]
    ) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """μ and diag σ²."""
        mean, std = self.mean_and_std(features)
        return mean, jnp.diag(std**2)

    def log_prob(
        self, z: Float[Array, " d"], features: Float[Array, " f"]
    ) -> Float[Array, ""]:
        """−½ Σ ((z − μ) / σ)² − Σ log σ − (d/2) log 2π."""
        mean, std = self.mean_and_std(features)
        return standard_normal((z - mean) / std) - jnp.sum(jnp.log(std))

    def sample(
        self, key: PRNGKeyArray, features: Float[Array, " f"]
    ) -> Float[Array, " d"]:
        """μ + σ ε."""
        mean, std = self.mean_and_std(features)
        return mean + std * jax.random.normal(key, mean.shape, mean.dtype)


class FullGaussian(AbstractHead):
    """N(μ(f), (PᵀP)⁻¹) with a lower triangular factor P(f) of the precision.

    The factor of the precision and not of the covariance: a log-density, which training
    asks for, is then a product, and only a draw solves. d (d + 3) / 2 numbers per f.

    Attributes:
        dim: d.
        num_features: Length of f.
        network: f ↦ (μ, raw P).

    Raises:
        ValueError: A count out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import FullGaussian
        >>> head = FullGaussian(3, 5, key=jax.random.key(0))
        >>> mean, covariance = head.mean_and_covariance(jnp.ones(5))
        >>> covariance.shape
        (3, 3)
    """

    dim: int = eqx.field(static=True)
    num_features: int = eqx.field(static=True)
    network: eqx.nn.MLP

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        width: int = 64,
        depth: int = 1,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the network.

        Args:
            dim: d.
            num_features: Length of f.
            width: Width of the hidden layers.
            depth: Number of hidden layers; 0 makes parameters linear in f.
            activation: Between them.
            key: Key of the weights.
        """
        self.dim, self.num_features = check_count("dim", dim), num_features
        outputs = dim * (dim + 3) // 2
        network = make_network(num_features, outputs, width, depth, activation, key)
        self.network = calm(network, np.arange(outputs) >= dim)

    def mean_and_factor(
        self, features: Float[Array, " f"]
    ) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """μ and P."""
        return unpack(self.network(features), self.dim)

    def mean_and_covariance(
        self, features: Float[Array, " f"]
    ) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """μ and (PᵀP)⁻¹."""
        mean, factor = self.mean_and_factor(features)
        inverse = jax.scipy.linalg.solve_triangular(
            factor, jnp.eye(self.dim, dtype=factor.dtype), lower=True
        )
        return mean, inverse @ inverse.T

    def log_prob(
        self, z: Float[Array, " d"], features: Float[Array, " f"]
    ) -> Float[Array, ""]:
        """−½ ‖P (z − μ)‖² + Σ log P_ii − (d/2) log 2π."""
        return full_log_prob(z, *self.mean_and_factor(features))

    def sample(
        self, key: PRNGKeyArray, features: Float[Array, " f"]
    ) -> Float[Array, " d"]:
        """μ + P⁻¹ ε."""
        return full_sample(key, *self.mean_and_factor(features))


class LowRankGaussian(AbstractHead):
    """N(μ(f), diag σ²(f) + U(f) U(f)ᵀ), U of rank r: for many correlated entries.

    Log-densities cost O(d r²) by the matrix determinant lemma; d (r + 2) numbers per f.

    Attributes:
        dim: d.
        num_features: Length of f.
        rank: r.
        network: f ↦ (μ, raw σ, U).

    Raises:
        ValueError: A count out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import LowRankGaussian
        >>> head = LowRankGaussian(60, 5, rank=4, key=jax.random.key(0))
        >>> head.sample(jax.random.key(1), jnp.ones(5)).shape
        (60,)
    """

    dim: int = eqx.field(static=True)
    num_features: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    network: eqx.nn.MLP

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        rank: int,
        width: int = 64,
        depth: int = 1,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the network.

        Args:
            dim: d.
            num_features: Length of f.
            rank: r.
            width: Width of the hidden layers.
            depth: Number of hidden layers; 0 makes parameters linear in f.
            activation: Between them.
            key: Key of the weights.
        """
        self.dim, self.num_features = check_count("dim", dim), num_features
        self.rank = check_count("rank", rank)
        outputs = dim * (rank + 2)
        self.network = make_network(
            num_features, outputs, width, depth, activation, key
        )

    def parameters(
        self, features: Float[Array, " f"]
    ) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, "d r"]]:
        """μ, σ and U."""
        mean, raw, factor = jnp.split(self.network(features), [self.dim, 2 * self.dim])
        return mean, positive(raw), factor.reshape(self.dim, self.rank)

    def mean_and_covariance(
        self, features: Float[Array, " f"]
    ) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """μ and diag σ² + U Uᵀ."""
        mean, std, factor = self.parameters(features)
        return mean, jnp.diag(std**2) + factor @ factor.T

    def log_prob(
        self, z: Float[Array, " d"], features: Float[Array, " f"]
    ) -> Float[Array, ""]:
        """log N(z; μ, diag σ² + U Uᵀ)."""
        mean, std, factor = self.parameters(features)
        # With W = U / σ and C = I + WᵀW, whose determinant is that of I + WWᵀ: the square
        # wᵀ (I + WWᵀ)⁻¹ w is |w − W b|² + |b|² at b = C⁻¹ Wᵀ w, which is where that is
        # least. As wᵀw − wᵀW b it would cancel, and where σ is small training finds the
        # weights whose rounding looks likely; as a sum of squares it only errs upward.
        white, scaled = (z - mean) / std, factor / std[:, None]
        small = jnp.eye(self.rank, dtype=z.dtype) + scaled.T @ scaled
        cholesky = jnp.linalg.cholesky(small)
        latent = jax.scipy.linalg.cho_solve((cholesky, True), scaled.T @ white)
        log_det = jnp.sum(jnp.log(std)) + jnp.sum(jnp.log(jnp.diagonal(cholesky)))
        square = 0.5 * jnp.sum(latent**2)
        return standard_normal(white - scaled @ latent) - square - log_det

    def sample(
        self, key: PRNGKeyArray, features: Float[Array, " f"]
    ) -> Float[Array, " d"]:
        """μ + σ ε + U ε′."""
        mean, std, factor = self.parameters(features)
        noise = jax.random.normal(key, (self.dim + self.rank,), mean.dtype)
        return mean + std * noise[: self.dim] + factor @ noise[self.dim :]


def standard_normal(white: Float[Array, " d"]) -> Float[Array, ""]:
    """log N(white; 0, I)."""
    return -0.5 * jnp.sum(white**2) - 0.5 * white.size * _LOG_2PI


def unpack(
    raw: Float[Array, " n"], dim: int
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and lower triangular factor P of d (d + 3) / 2 numbers.

    P = C diag(1 / σ) with ones on C's diagonal: correlations are learned apart from scales,
    and a σ of any size is as near as its logarithm. A diagonal of P that were itself made
    positive would have to grow linearly to 1 / σ, which takes as many updates.
    """
    mean, diagonal, lower = jnp.split(raw, [dim, 2 * dim])
    rows, columns = np.tril_indices(dim, -1)
    mixing = jnp.eye(dim, dtype=raw.dtype).at[rows, columns].set(lower)
    return mean, mixing / positive(diagonal)[None]


def calm(network: eqx.nn.MLP, outputs: np.ndarray) -> eqx.nn.MLP:
    """The same with the first weights of some outputs a tenth as large.

    A σ that begins tiny for some features makes squares there so large that Adam's step
    stays small for thousands of updates.
    """
    scale = np.where(outputs, 0.1, 1.0)
    last = network.layers[-1]
    weights = (
        last.weight * scale[:, None].astype(last.weight.dtype),
        last.bias * (scale.astype(last.bias.dtype)),
    )
    return eqx.tree_at(
        lambda n: (n.layers[-1].weight, n.layers[-1].bias), network, weights
    )


def full_log_prob(
    z: Float[Array, " d"], mean: Float[Array, " d"], factor: Float[Array, "d d"]
) -> Float[Array, ""]:
    """log N(z; mean, (factorᵀ factor)⁻¹)."""
    log_det = jnp.sum(jnp.log(jnp.diagonal(factor)))
    return standard_normal(factor @ (z - mean)) + log_det


def full_sample(
    key: PRNGKeyArray, mean: Float[Array, " d"], factor: Float[Array, "d d"]
) -> Float[Array, " d"]:
    """A draw of N(mean, (factorᵀ factor)⁻¹)."""
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    return mean + jax.scipy.linalg.solve_triangular(factor, noise, lower=True)
